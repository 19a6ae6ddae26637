"""Turn a Hugging Face directory of safetensors into one that keeps its parameters as orbax, one piece per layer.

python -m convert.to_orbax --model DIR --output DIR2 [--dtype bfloat16]
"""

from pathlib import Path

from convert import DTYPES, Parser, copy_besides, run, whole_directory
from convert.integrity import ALLOW, only_finite
from moespec_jax.checkpoint.hub import locate
from moespec_jax.checkpoint.orbax_io import write_orbax
from moespec_jax.checkpoint.read import load_config, open_safetensors
from moespec_jax.cli.process_flags import add_process_flags, join_processes
from moespec_jax.parallel.processes import is_first_process


def main() -> int:
    """Convert as the command line says."""
    parser = Parser(prog="python -m convert.to_orbax", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="directory of safetensors, or a hub id")
    parser.add_argument("--output", required=True, type=Path, help="directory to be made; must not hold anything")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of all parameters (default: as they are)")
    parser.add_argument(ALLOW, action="store_true", help="also weights that are NaN or infinite")
    add_process_flags(parser.add_argument_group("several processes, which share the work and the output directory"))
    arguments = parser.parse_args()
    join_processes(arguments)
    model = locate(arguments.model)
    config = load_config(model)
    source = open_safetensors(model, config)
    if not arguments.allow_non_finite:
        source = only_finite(source)
    with whole_directory(arguments.output) as directory:
        write_orbax(source, config, directory, arguments.dtype, progress=True)
        if is_first_process():
            copy_besides(model, directory, arguments.dtype)
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    run(main)
