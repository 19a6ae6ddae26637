"""A round of block drafting under the compilers for a TPU and a GPU, on a machine without either:

    python -m benchmarks.block_programs v5e --out benchmarks/results    # pip install "jax[tpu]"
    python -m benchmarks.block_programs sm_90 --out benchmarks/results  # pip install "jax[cuda12]"

compiles `Speculative.step` ahead of time for Qwen3-30B-A3B with a DFlash head of the published shape (RedHatAI's: 5
layers, block of 8, an embedding of its own, 32000 tokens; 680.8 M parameters), with a DSpark head of the same shape
(the newest token's row drafts too, a Markov part of rank 256 and an estimate of acceptance), and with an EAGLE-3 head
that drafts a chain as long. bfloat16, batch 1, caches of 2048 slots. The target is cut to 8 of its 48 layers, since
the whole does not fit one v5e, and on a GPU also to 4: what a layer launches is a quarter of the difference. Nothing
runs, so there are no times.

Columns:
    temp_mb: temporary memory of the program of 8 layers.
    cache_aliased: whether all bytes of the caches that go in come out in the same memory (TPU only).
    large_copies: copies of 4 MB or more of weights and caches (see `tpu_hlo.py`). On GPUs: all values of this size but
        those of kernels and matrix products.
    kernels_per_layer, rest, kernels_per_round: launches of one layer of the target, of the round without layers, and of
        a round of the whole model (GPU only; see `gpu_programs.py`).
    compile_s: seconds of lowering and compiling the program of 8 layers, on a machine that did other work.
"""

import argparse
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.tpu_hlo import computations, copyable_sizes, large_values
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.head.dflash_table import block_table, build_block_head
from moespec_jax.checkpoint.parameters import abstract_decoder, final_shape
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.dflash_drafter import DFlashDrafter
from moespec_jax.decoding.drafter import SpeculativeParams
from moespec_jax.decoding.eagle3_drafter import Eagle3Drafter
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.states import Prompts
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.measure.local_bytes import local_bytes
from moespec_jax.measure.published_shapes import MODELS, draft_config
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.nn.dflash import DFlashHead
from moespec_jax.plan.abstract import placed, with_layers
from moespec_jax.plan.program import DTYPE, abstract_head
from moespec_jax.runtime.programs import Programs

MODEL, SLOTS, FEW, MORE = "Qwen3-30B-A3B", 2048, 4, 8
BACKEND = {"v5e": "pallas", "sm_90": "fused"}
_DSPARK: dict[str, Any] = dict(
    sample_from_anchor=True, markov="vanilla", markov_rank=256, confidence="hidden and markov"
)
# Head, and fraction of the experts that a verification may read.
PROGRAMS: dict[str, tuple[dict[str, Any] | None, float | None]] = {
    "EAGLE-3, chain of 7": (None, None),
    "DFlash": ({}, None),
    "DFlash N/4": ({}, 0.25),
    "DSpark": (_DSPARK, None),
}


def main() -> None:
    """Compile all programs for one chip, and write its rows beside those of the other."""
    parser = argparse.ArgumentParser(description="Compile rounds of block drafting ahead of time.")
    parser.add_argument("chip", choices=BACKEND)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--out", type=Path, help="directory whose block_programs.json gets the rows (default: print)")
    options = parser.parse_args()
    rows = []
    for program in options.programs:
        rows.append({"chip": options.chip, "program": program, **row_of(options.chip, program)})
        print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        file = options.out / "block_programs.json"
        report = json.loads(file.read_text()) if file.exists() else {"model": MODEL, "slots": SLOTS}
        report[options.chip] = {"versions": versions(options.chip), "rows": rows}
        file.write_text(json.dumps(report, indent=1) + "\n")


def row_of(chip: str, program: str) -> dict[str, Any]:
    """The row of a program, with launches by layer where there are launches."""
    row = {"layers": MORE} | examine(chip, program, MORE)
    if "kernels" not in row:
        return row
    kernels, few = row.pop("kernels"), examine(chip, program, FEW)["kernels"]
    layer, whole = (kernels - few) / (MORE - FEW), read_config(MODELS[MODEL]).num_hidden_layers
    rest = kernels - MORE * layer
    return row | {"kernels_per_layer": layer, "rest": rest, "kernels_per_round": rest + whole * layer}


def published_head(target: DecoderConfig, **changes: Any) -> DFlashConfig:
    """Settings of RedHatAI's head, whose boundaries are moved into a target that is cut."""
    cut = target.num_hidden_layers < 48
    fields: dict[str, Any] = dict(
        vocab_size=target.vocab_size, draft_vocab_size=32000, hidden_size=2048, target_hidden_size=2048,
        intermediate_size=6144, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        boundaries=(0, 1, 2, 3, 4) if cut else (1, 12, 23, 34, 45), block_size=8, mask_token_id=151669,
        sliding_windows=(0,) * 5, causal=(False,) * 5, own_embedding=True, max_position_embeddings=40960,
        rope=target.rope,
    )  # fmt: skip
    return DFlashConfig(**(fields | changes))


def round_of(
    config: DecoderConfig, head: dict[str, Any] | None, budget: float | None, backend: Backend
) -> tuple[Speculative[Any, Any], SpeculativeParams[Any], Any]:
    """Method, parameters and state of a round, as shapes."""
    drafter: Any  # of either kind
    if head is None:
        eagle = draft_config(MODEL, config, boundaries=(0, 2, 4))
        drafter, weights, tree = Eagle3Drafter(eagle, backend), abstract_head(eagle), TreeConfig(6, 1, 8)
    else:
        block = published_head(config, **head)
        drafter, weights, tree = DFlashDrafter(block, backend), abstract_block_head(block), block.whole_block
    params = SpeculativeParams(abstract_decoder(config, backend, DTYPE), weights)
    limit = None if budget is None else resolve(BudgetConfig(budget), config)
    plain = Autoregressive(config, SamplingConfig(), backend)
    method = Speculative(plain, drafter, tree, accept_rule(SamplingConfig(), tree.longest_path), limit)

    def begin(params: SpeculativeParams[Any]) -> Any:
        ids, tokens = jnp.zeros((1,), jnp.int32), jnp.zeros((1, SLOTS), jnp.int32)
        prompts = Prompts(tokens, ids, ids, jnp.zeros((8,), jnp.int32), jax.random.key(0))
        return method.begin(params, method.prefill.init(params, 1, SLOTS), prompts)

    return method, params, jax.eval_shape(begin, params)


def abstract_block_head(config: DFlashConfig) -> DFlashHead:
    """A DFlash head of abstract arrays."""
    leaves = {t.path: jax.ShapeDtypeStruct(final_shape(t), DTYPE) for t in block_table(config).values()}
    ids = jax.ShapeDtypeStruct((config.draft_vocab_size,), jnp.int32)
    return build_block_head(config, leaves | {("target_ids",): ids})


def examine(chip: str, program: str, layers: int) -> dict[str, Any]:
    """Compile one program of a target of so many layers; returns the compiler's statistics."""
    config, (head, budget) = with_layers(read_config(MODELS[MODEL]), layers), PROGRAMS[program]
    method, params, state = round_of(config, head, budget, BACKENDS[BACKEND[chip]])
    device, number = device_of(chip), jax.ShapeDtypeStruct((), jnp.int32)
    params, state, number = placed((params, state, number), SingleDeviceSharding(device))
    started = time.perf_counter()
    if chip == "sm_90":
        from moespec_jax.plan.cuda import lowering_for

        with lowering_for(chip):
            lowered = Programs().lower(method.step, params, state, number, donate=True)
    else:
        lowered = Programs().lower(method.step, params, state, number, donate=True)
    compiled = lowered.compile()
    seconds, memory, hlo = time.perf_counter() - started, compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and hlo is not None
    draft = sum(leaf.size for leaf in jax.tree.leaves(params.draft) if leaf.dtype == DTYPE)
    row = {
        "backend": BACKEND[chip], "tree": method.tree.name, "head_parameters_m": round(draft / 1e6, 1),
        "temp_mb": round(memory.temp_size_in_bytes / 1e6, 2), "compile_s": round(seconds, 1),
    }  # fmt: skip
    caches = (state.decoding.cache.k, state.decoding.cache.v, state.draft.cache.k, state.draft.cache.v)
    if chip == "sm_90":
        return row | on_gpu(hlo)
    copies, activations = large_values(hlo, copyable_sizes(config, (params, caches)))
    return row | {
        "cache_aliased": memory.alias_size_in_bytes >= local_bytes(caches),
        "large_copies": dict(Counter(copies)), "large_activations": dict(Counter(activations)),
    }  # fmt: skip


def on_gpu(hlo: str) -> dict[str, Any]:
    """Launches of a round, and large values that are no results of kernels."""
    from benchmarks.gpu_launches import written
    from benchmarks.gpu_programs import kernels_in_loops

    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)
    assert entry is not None
    values = written(dict(Counter(large_values(hlo, set())[1])))
    return {"kernels": kernels_in_loops(entry[1], computations(hlo)), "large_copies": values}


def device_of(chip: str) -> Any:
    """The chip as its compiler describes it."""
    if chip == "sm_90":
        from moespec_jax.plan.cuda import described_devices

        return described_devices(chip)[0]
    from moespec_jax.plan.ahead import devices

    return devices(chip)[0]


def versions(chip: str) -> dict[str, str]:
    """Versions of JAX and of the chip's compiler."""
    if chip == "sm_90":
        from moespec_jax.plan.cuda import installed_versions

        return installed_versions()
    from moespec_jax.plan import ahead

    return ahead.versions()


if __name__ == "__main__":
    main()
