"""Compare this library's logits with those of transformers (which needs torch), in float32, on random tokens.

    python -m convert.check --model DIR [--reference DIR] [--tolerance 1e-3]
    python -m convert.check --model DIR --files

Prints the largest absolute difference; the exit status is 1 if it exceeds the tolerance. With --files no model is run
and torch is not needed: the files of a download are compared with the hub's hashes of them, and tensors with values
that are not finite are named.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert import make_parser, run
from convert.integrity import check_finite, check_hashes
from moespec_jax.checkpoint.hub import locate
from moespec_jax.checkpoint.read import load_config, load_parameters, open_source
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import default_backend
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.decoder import forward, unembed


def main() -> int:
    """Run the comparison of the command line."""
    parser = make_parser("check", __doc__)
    parser.add_argument("--model", required=True, help="directory (safetensors or orbax) or hub id")
    parser.add_argument("--reference", help="directory that transformers loads; required where --model is orbax")
    parser.add_argument("--files", action="store_true", help="check hashes, shapes and values instead")
    parser.add_argument("--tokens", type=int, default=64, help="length of each of two random sequences (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of these sequences (default: 0)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference accepted (default: 1e-3)")
    arguments = parser.parse_args()
    model = locate(arguments.model)
    if arguments.files:
        print(check_files(model))
        return 0
    reference = locate(arguments.reference) if arguments.reference else model
    config = load_config(model)
    if not 1 <= arguments.tokens <= config.max_position_embeddings:
        parser.error(f"expected --tokens from 1 to {config.max_position_embeddings}; got {arguments.tokens}")
    tokens = np.random.default_rng(arguments.seed).integers(0, config.vocab_size, (2, arguments.tokens), np.int32)
    expected = reference_logits(reference, tokens)
    actual = our_logits(model, config, tokens)
    if actual.shape != expected.shape:
        raise CheckpointError(f"expected logits {list(actual.shape)} of the reference; got {list(expected.shape)}")
    difference = float(np.max(np.abs(actual - expected)))
    print(f"largest absolute difference {difference:.3g}, tolerance {arguments.tolerance:g}")
    # A NaN exceeds any tolerance.
    return 0 if difference <= arguments.tolerance else 1


def check_files(model: Path) -> str:
    """Check the files and tensors of a checkpoint; return a summary.

    Raises:
        CheckpointError: a file differs from the hub's, or a tensor is missing, misshapen or not finite.
    """
    equal, unknown = check_hashes(model)
    source = open_source(model, load_config(model))
    check_finite(source.read(source.table), f"in {model}")
    return (
        f"{equal} files are as the hub has them; of {unknown} no hash is known;"
        f" {len(source.table)} tensors have their shapes and are finite"
    )


def our_logits(directory: Path, config: DecoderConfig, tokens: np.ndarray) -> np.ndarray:
    """Compute logits `[batch, tokens, vocab]` with this library, in float32."""
    backend = default_backend()
    params = load_parameters(directory, config, backend, "float32", progress=True)
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length))
    cache = empty_cache(config, batch, length, jnp.float32, stacked=backend.stacked)

    @jax.jit
    def logits(params, cache):
        mask = causal_mask(positions, length)
        hidden, _, _ = forward(config, params, jnp.asarray(tokens), positions, mask, cache, backend)
        return unembed(params, hidden)

    with jax.default_matmul_precision("highest"):
        return np.asarray(logits(params, cache))


def reference_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """Compute logits `[batch, tokens, vocab]` with transformers, in float32.

    Raises:
        CheckpointError: torch is not installed, or transformers does not load the directory.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.quantizers.auto import AutoHfQuantizer
    except ImportError as error:
        raise CheckpointError(f"expected torch and transformers to compare with; {error}") from None
    try:
        config = AutoConfig.from_pretrained(directory)
        if (section := getattr(config, "quantization_config", None)) is not None:
            if not AutoHfQuantizer.supports_quant_method(section):  # it would read codes as weights
                raise CheckpointError(f"it does not know quant_method {section.get('quant_method')!r}; see --reference")
            section["dequantize"] = True  # else it may quantize activations, or need a GPU
        model = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=torch.float32, attn_implementation="eager"
        )
    except Exception as error:  # transformers documents no types of exceptions
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"expected a directory that transformers loads; {directory}: {reason}") from None
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens).long()).logits.float().numpy()


if __name__ == "__main__":
    run(main)
