"""Compare this library's logits with those of transformers (which needs torch), in float32, on random tokens.

    python -m convert.check --model DIR [--reference DIR] [--tolerance 1e-3]
    python -m convert.check --model DIR --files

Prints the largest absolute difference; exit status 1 if it exceeds the tolerance. With --files nothing is run, and
there need be no torch: the files of a download are compared with the hashes that the hub calls them by, and every
tensor with a value that is not finite is named.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert import Parser, run
from convert.integrity import check_hashes, refuse_not_finite
from moespec_jax.checkpoint.hub import locate
from moespec_jax.checkpoint.read import load_config, load_parameters, open_source
from moespec_jax.checkpoint.tensor_table import tensor_table
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import default_backend
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.decoder import forward, unembed


def main() -> int:
    """Compare as the command line says."""
    parser = Parser(prog="python -m convert.check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="directory (safetensors or orbax) or hub id")
    parser.add_argument("--reference", help="directory transformers loads; needed where --model is orbax")
    parser.add_argument("--files", action="store_true", help="check hashes, shapes and values instead")
    parser.add_argument("--tokens", type=int, default=64, help="length of each of two random sequences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    arguments = parser.parse_args()
    model = locate(arguments.model)
    if arguments.files:
        print(check_files(model))
        return 0
    reference = locate(arguments.reference) if arguments.reference else model
    config = load_config(model)
    if not 1 <= arguments.tokens <= config.max_position_embeddings:
        parser.error(f"expected --tokens from 1 to {config.max_position_embeddings}; came {arguments.tokens}")
    tokens = np.random.default_rng(arguments.seed).integers(0, config.vocab_size, (2, arguments.tokens), np.int32)
    theirs = reference_logits(reference, tokens)
    ours = our_logits(model, config, tokens)
    if ours.shape != theirs.shape:
        raise CheckpointError(f"expected logits {list(ours.shape)} of the reference; came {list(theirs.shape)}")
    difference = float(np.max(np.abs(ours - theirs)))
    print(f"largest absolute difference {difference:.3g}, tolerance {arguments.tolerance:g}")
    # A NaN exceeds any tolerance.
    return 0 if difference <= arguments.tolerance else 1


def check_files(model: Path) -> str:
    """What is told of a whole checkpoint: how much of it could be checked.

    Raises:
        CheckpointError: a file is not the hub's, or a tensor is missing, misshapen or not finite.
    """
    right, unknown = check_hashes(model)
    config = load_config(model)
    table = tensor_table(config)
    refuse_not_finite(open_source(model, config).read(table), f"in {model}")
    return (
        f"{right} files are as the hub has them; of {unknown} no hash is known;"
        f" {len(table)} tensors have their shapes and are finite"
    )


def our_logits(directory: Path, config: DecoderConfig, tokens: np.ndarray) -> np.ndarray:
    """Logits `[batch, tokens, vocab]` of this library."""
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
    """Logits `[batch, tokens, vocab]` of transformers.

    Raises:
        CheckpointError: there is no torch, or transformers does not load the directory.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise CheckpointError(f"expected torch and transformers to compare with; {error}") from None
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    except Exception as error:  # whatever transformers finds wrong with it
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"expected a directory that transformers loads; {directory}: {reason}") from None
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens).long()).logits.float().numpy()


if __name__ == "__main__":
    run(main)
