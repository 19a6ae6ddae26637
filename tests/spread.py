"""Decoding on meshes of devices beside decoding on one: a program of its own, for the number of devices, and of
processes, is settled at its start. Prints, as JSON, the tokens of every way to decode on every mesh.

python tests/spread.py FAMILY [--mesh data=2,expert=4 ...] [--processes N --process-id I --coordinator HOST:PORT]
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from speculation import draft_config, small_head
from tiny import CONFIG, tiny_tensors

from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.leaves import Source, load_source
from moespec_jax.checkpoint.placement import decoder_placement, head_placement, place_head, with_repeated_heads
from moespec_jax.checkpoint.tensor_table import tensor_table
from moespec_jax.config import DecoderConfig, DraftConfig, TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.drafter import SpeculativeParams
from moespec_jax.decoding.eagle3_drafter import Eagle3Drafter
from moespec_jax.decoding.menu import Menu
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.parallel.mesh import make_mesh, parse_mesh
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.run import Batch, Run
from moespec_jax.runtime.samples import with_samples

# Eight heads and eight experts of width 16, so that eight devices have something to split; few key/value heads, which
# are repeated then.
FIELDS: dict[str, Any] = CONFIG | dict(
    vocab_size=16, num_attention_heads=8, num_key_value_heads=2, num_experts=8, max_position_embeddings=512
)
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": dict(intermediate_size=16, hidden_size=64, norm_topk_prob=False, clip_qkv=8.0, num_key_value_heads=4),
    "qwen3_moe": dict(mlp_only_layers=[0], num_hidden_layers=3, tie_word_embeddings=True),
    "qwen2_moe": dict(shared_expert_intermediate_size=16, use_sliding_window=True, sliding_window=7),
    "mixtral": dict(intermediate_size=16, num_local_experts=8, sliding_window=None),
}
# Heads whose random guesses are often right.
HEAD_SEEDS = {"olmoe": 4, "qwen3_moe": 2, "qwen2_moe": 3, "mixtral": 8}
PROMPTS, NEW, TREE = [[1, 2, 3, 4, 5], [7], [3, 6] * 10], 24, TreeConfig(2, 6, 20)
BUDGET = dict(experts=4, anchor="root", score="path", credit="squares")
WAYS = ("plain", "tree", "sampled", "global", "balanced", "menu")
# Seconds of a round, nearly equal so that all shapes run: plain decoding, `TREE`, `CHAIN`.
CHAIN, COSTS = TreeConfig(2, 1, 4), [1.0, 1.1, 1.05]


class Pair:
    """Target and head of a family, on one device or spread over a mesh."""

    def __init__(self, family: str, mesh: str | None, quantization: Any = None):
        fields = FIELDS | dict(model_type=family) | FAMILIES[family]
        config, tensors = read_config(fields), tiny_tensors(fields)
        source = Source(
            {name: np.dtype(np.float32) for name in tensors},
            lambda names: ((n, tensors[n]) for n in names),
            tensor_table(config),
        )
        slots = BACKENDS["slots"]
        whole = load_source(source, config, slots, "float32", None, False, quantization)
        draft = draft_config(config, draft_vocab_size=16, num_attention_heads=8, num_key_value_heads=1)
        head = small_head(draft, whole, HEAD_SEEDS[family])
        if mesh is None:
            self.config, self.params, self.draft, self.head, self.programs = config, whole, draft, head, Programs()
            return
        devices = make_mesh(parse_mesh(mesh))
        placement, beside = decoder_placement(config, devices), head_placement(draft, devices)
        self.config: DecoderConfig = with_repeated_heads(config, placement)
        self.params: Decoder = load_source(source, config, slots, "float32", placement, False, quantization)
        self.draft: DraftConfig = with_repeated_heads(draft, beside)
        self.head: DraftHead = place_head(head, self.draft, beside)
        self.programs = Programs(devices)

    def decode(self, way: str, groups: int) -> dict[str, Any]:
        """Tokens and what was read; a balanced budget divides it among so many groups of experts."""
        samples = 4 if way == "samples" else 1
        prompts = with_samples(PROMPTS, samples)
        batch = Batch(prompts, [len(p) + NEW for p in prompts], (), 5, samples)
        method, params = self._method(way, groups)
        run = Run(self.programs, method, params, batch)

        def price(advance: Any, state: Any) -> Any:
            costs, gains = (self.programs.put(np.asarray(v, np.float32)) for v in (COSTS, [1.0, 1.5, 1.5]))
            specs = None if self.programs.mesh is None else method.specs(params)[0]
            return self.programs.run(Menu.price, method, params, state, costs, gains, donate=True, specs=specs)

        run.execute(prepare=price if way == "menu" else None)
        sums: dict[str, Any] = {name: round(value / max(run.rounds, 1), 4) for name, value in run.sums.items()}
        if run.logprobs is not None:
            sums["logprobs"] = run.logprobs.token[: len(prompts), : max(batch.limit)].tolist()
        return {"tokens": run.sequences, "rounds": run.rounds, "accepted": run.accepted.tolist(), **sums}

    def _method(self, way: str, groups: int) -> tuple[Any, Any]:
        """The method and its parameters."""
        sampling = SamplingConfig(1.0) if way in ("sampled", "samples") else SamplingConfig()
        plain = Autoregressive(self.config, sampling, BACKENDS["slots"], logprobs=2 if way == "samples" else None)
        if way == "plain":
            return plain, self.params
        budget = {"global": BudgetConfig(**BUDGET), "balanced": BudgetConfig(**BUDGET, groups=groups)}.get(way)
        budget = None if budget is None else resolve(budget, self.config)
        methods = [
            Speculative(plain, Eagle3Drafter(self.draft), tree, accept_rule(sampling, tree.longest_path), budget)
            for tree in (TREE, CHAIN)
        ]
        return Menu(tuple(methods)) if way == "menu" else methods[0], SpeculativeParams(self.params, self.head)


def all_ways(family: str, mesh: str | None, ways: list[str], groups: int) -> Iterator[tuple[str, Any]]:
    pair = Pair(family, mesh)
    return ((way, pair.decode(way, groups)) for way in ways)


def main() -> None:
    """Decode as asked on every mesh, and on one device for each number of groups there is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--mesh", nargs="+", default=[])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=(*WAYS, "samples"))
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--coordinator")
    asked = parser.parse_args()
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_default_matmul_precision", "highest")
    if asked.processes:
        jax.distributed.initialize(asked.coordinator, asked.processes, asked.process_id)
    found: dict[str, Any] = {}
    for mesh in asked.mesh:
        groups = parse_mesh(mesh).expert
        found[mesh] = dict(all_ways(asked.family, mesh, asked.ways, groups))
        # A balanced budget depends on how many devices share the experts.
        names = {way: f"one/{way}{groups if way == 'balanced' else ''}" for way in asked.ways}
        missing = [way for way, name in names.items() if name not in found]
        found |= {names[way]: value for way, value in all_ways(asked.family, None, missing, groups)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
