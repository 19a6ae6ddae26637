"""Turn a directory converted to orbax back into a Hugging Face directory of safetensors.

python -m convert.to_hf --model DIR --output DIR2 [--dtype bfloat16] [--max-shard-bytes 5000000000]
"""

from pathlib import Path

from convert import DTYPES, Parser, copy_besides, run, whole_directory
from convert.integrity import ALLOW, only_finite
from moespec_jax.checkpoint.hub import locate
from moespec_jax.checkpoint.read import load_config, open_source
from moespec_jax.checkpoint.write import MAX_SHARD_BYTES, write_safetensors


def main() -> int:
    """Convert as the command line says."""
    parser = Parser(prog="python -m convert.to_hf", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="directory of orbax (or safetensors, to change dtype or shards)")
    parser.add_argument("--output", required=True, type=Path, help="directory to be made; must not hold anything")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of all parameters (default: as they are)")
    parser.add_argument("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES, help="size a shard should not exceed")
    parser.add_argument(ALLOW, action="store_true", help="also weights that are NaN or infinite")
    arguments = parser.parse_args()
    if arguments.max_shard_bytes < 1:
        parser.error(f"expected --max-shard-bytes of at least 1; came {arguments.max_shard_bytes}")
    model = locate(arguments.model)
    config = load_config(model)
    source = open_source(model, config)
    if not arguments.allow_non_finite:
        source = only_finite(source)
    with whole_directory(arguments.output) as directory:
        write_safetensors(source, config, directory, arguments.dtype, arguments.max_shard_bytes, progress=True)
        copy_besides(model, directory, arguments.dtype)
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    run(main)
