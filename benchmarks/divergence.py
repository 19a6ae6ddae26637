"""How often bfloat16 speculation leaves plain decoding's path, and over how little: `python -m benchmarks.divergence`.

In float32 the two give the same tokens. In bfloat16 a pass over several rows rounds differently from a pass over one,
and where the target's two best logits nearly tie, the other may win. The embedded pair, greedily, on pieces of held-out
modules: the share of prompts whose texts part within 128 tokens, and by how much the first choice led the second, in
float32, at the token where they part.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moespec_jax.config import TreeConfig
from moespec_jax.measure.prompt_sets import held_out_pieces
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.decoder import Decoder, forward, unembed
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model

NEW = 128


def main() -> int:
    """Decode both ways in bfloat16 and write `divergence.json`, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory to write divergence.json to (default: print)")
    parser.add_argument("--count", type=int, default=64, help="prompts")
    options = parser.parse_args()
    model, exact = load(dtype="bfloat16"), load(draft_model="none", dtype="float32")
    prompts = held_out_pieces(model, options.count)
    plain = model.generate(prompts, tree=None, max_new_tokens=NEW, ignore_eos=True)
    rows = []
    for tree in (TreeConfig(2, 1, 4), TreeConfig(4, 4, 16)):
        drafted = model.generate(prompts, tree=tree, max_new_tokens=NEW, ignore_eos=True)
        gaps = []
        for prompt, a, b in zip(prompts, plain.prompts, drafted.prompts, strict=True):
            differ = np.flatnonzero(np.array(a.token_ids) != np.array(b.token_ids))
            if differ.size:
                gaps.append(leading_gap(exact, prompt + a.token_ids[: differ[0]]))
        row = {"tree": tree.name, "prompts": len(prompts), "diverged": len(gaps)}
        rows.append(row | {"gap_median": statistics.median(gaps) if gaps else None, "gap_max": max(gaps, default=None)})
        print(json.dumps(rows[-1]), file=sys.stderr)
    report = {"new_tokens": NEW, "dtype": "bfloat16", "device": plain.device, "versions": plain.versions, "rows": rows}
    text = json.dumps(report, indent=1) + "\n"
    print(text) if options.out is None else (options.out / "divergence.json").write_text(text)
    return 0


def leading_gap(model: Model, ids: list[int]) -> float:
    """How far the best next token's logit is above the second's, in float32."""
    padded = np.zeros((1, 512), np.int32)
    padded[0, : len(ids)] = ids
    best = np.sort(np.asarray(_logits(model, model.params, jnp.asarray(padded)))[0, len(ids) - 1])[-2:]
    return round(float(best[1] - best[0]), 4)


def _logits(model: Model, params: Decoder, tokens: jax.Array) -> jax.Array:
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    mask = causal_mask(positions, tokens.shape[1])
    hidden, _, _ = forward(model.config, params, tokens, positions, mask, None, model.backend)
    return unembed(params, hidden)


if __name__ == "__main__":
    sys.exit(main())
