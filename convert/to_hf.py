"""Convert a directory of orbax back into a Hugging Face directory of safetensors.

python -m convert.to_hf --model DIR --output DIR2 [--dtype bfloat16] [--max-shard-bytes 5000000000]
"""

from convert import add_output_flags, atomic_directory, copy_metadata, make_parser, run
from convert.integrity import only_finite
from moespec_jax.checkpoint.fused import as_published
from moespec_jax.checkpoint.hub import locate
from moespec_jax.checkpoint.read import load_config, open_source
from moespec_jax.checkpoint.write import MAX_SHARD_BYTES, write_safetensors


def main() -> int:
    """Run the conversion of the command line."""
    parser = make_parser("to_hf", __doc__)
    parser.add_argument("--model", required=True, help="directory of orbax (or safetensors, to change dtype or shards)")
    parser.add_argument(
        "--max-shard-bytes", type=int, default=MAX_SHARD_BYTES, help="largest size of a shard (default: %(default)s)"
    )
    add_output_flags(parser)
    arguments = parser.parse_args()
    if arguments.max_shard_bytes < 1:
        parser.error(f"expected --max-shard-bytes of at least 1; got {arguments.max_shard_bytes}")
    model = locate(arguments.model)
    config = load_config(model)
    source = open_source(model, config)
    if not arguments.allow_non_finite:
        source = only_finite(source)
    with atomic_directory(arguments.output) as directory:
        write_safetensors(
            as_published(source, config), directory, arguments.dtype, arguments.max_shard_bytes, progress=True
        )
        copy_metadata(model, directory, arguments.dtype)
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    run(main)
