"""Convert a Hugging Face directory of safetensors into one of orbax checkpoints, one for each layer.

python -m convert.to_orbax --model DIR --output DIR2 [--dtype bfloat16]
"""

from convert import add_output_flags, atomic_directory, copy_metadata, make_parser, run
from convert.integrity import only_finite
from moespec_jax.checkpoint.hub import locate
from moespec_jax.checkpoint.orbax_io import write_orbax
from moespec_jax.checkpoint.read import load_config, open_safetensors
from moespec_jax.cli.process_flags import add_process_flags, join_processes
from moespec_jax.parallel.processes import is_first_process


def main() -> int:
    """Run the conversion of the command line."""
    parser = make_parser("to_orbax", __doc__)
    parser.add_argument("--model", required=True, help="directory of safetensors, or a hub id")
    add_output_flags(parser)
    add_process_flags(parser.add_argument_group("several processes, which share the work and the output directory"))
    arguments = parser.parse_args()
    join_processes(arguments)
    model = locate(arguments.model)
    config = load_config(model)
    source = open_safetensors(model, config)
    if not arguments.allow_non_finite:
        source = only_finite(source)
    with atomic_directory(arguments.output) as directory:
        write_orbax(source, config, directory, arguments.dtype, progress=True)
        if is_first_process():
            copy_metadata(model, directory, arguments.dtype)
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    run(main)
