"""`--speculate auto` against plain decoding and every fixed shape: `python -m benchmarks.auto --out DIR`.

The embedded pair, batch 1, greedy, float32, exact and with a quarter of the experts. Prompts: held-out modules, the
target's own text (128 tokens of its own after a held-out piece), and any `--prompts NAME=FILE`. All settings take turns
in one process: in every turn each decodes all prompts, and its seconds are divided by plain decoding's and by those of
the fixed shape that was fastest on this set in all turns. Compilation and prefill do not count. Costs of rounds are
measured anew in the turn that warms up.

Two further parts: `overhead` times a menu of one tree, whose rounds choose it always, against the tree itself;
`compile` measures compile time and memory of the whole menu and of one tree, without a cache of programs. Each part
runs by itself (`--part`), on an idle machine, and adds its results to auto.json.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.menu import Menu, MenuState
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.measure.prompt_sets import continued, held_out_pieces, prompt_sets
from moespec_jax.runtime.drafters import MENU
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.results import RunResult
from moespec_jax.runtime.run import Advance, Batch, Run

LONGEST_PROMPT, OWN = 128, "the target's own text"


def main() -> int:
    """Measure one part, and add it to `auto.json`, or print it."""
    options = _options()
    if options.cache is not None:
        shutil.rmtree(options.cache / "round_costs", ignore_errors=True)
        jax.config.update("jax_compilation_cache_dir", str(options.cache))
    model = load(dtype="float32")
    found = {"speed": speed, "overhead": overhead, "compile": compilation}[options.part](model, options)
    where = model.generate([[0]], tree=None, max_new_tokens=1)
    found |= {"device": where.device, "dtype": where.dtype, "versions": where.versions}
    if options.out is None:
        print(json.dumps({options.part: found}))
        return 0
    file = options.out / "auto.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | {options.part: found}, indent=1) + "\n")
    return 0


def speed(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """Time all settings on all sets in turns; no turn begins that would end after the time allowed."""
    started = time.perf_counter()
    sets, settings = _sets(model, options), _settings()
    turns: list[dict[tuple[str, str], dict[str, Any]]] = []
    for number in range(options.repeats + 1):
        began = time.perf_counter()
        turns.append(
            {(name, own): decode(model, prompts, spec, options.tokens) for name, prompts in sets.items()
             for own, spec in settings.items()}
        )  # fmt: skip
        took = time.perf_counter() - began
        print(f"turn {number} took {took:.0f} s", file=sys.stderr)
        if number and time.perf_counter() - started + took > options.seconds:
            break
    turns = turns[1:]  # the first one compiles, measures the costs and warms up
    rows = [row for name in sets for row in _rows(name, settings, turns)]
    about = {"prompts": options.count, "new_tokens": options.tokens, "turns": len(turns)}
    return about | {"costs": {kind: turns[-1][next(iter(sets)), kind]["choice"] for kind in ("auto", "auto B=0.25")},
                    "rows": rows}  # fmt: skip


def decode(model: Model, prompts: Sequence[Sequence[int]], spec: DecodingSpec, new: int) -> dict[str, Any]:
    """Decode all prompts one after another: seconds a token, tokens, rounds of each shape."""
    results: list[RunResult] = [
        model.generate([list(p)], tree=spec.tree, budget=spec.budget, max_new_tokens=new, ignore_eos=True)
        for p in prompts
    ]
    choices = [r.choice for r in results if r.choice is not None]
    rounds: dict[str, int] = {}
    for choice in choices:
        rounds = {shape: rounds.get(shape, 0) + count for shape, count in choice["rounds"].items()}
    return {
        "s_per_token": sum(r.decode_s for r in results) / sum(r.prompts[0].new_tokens - 1 for r in results),
        "by_text": [r.decode_s for r in results], "tokens": [r.prompts[0].token_ids for r in results],
        "rounds": rounds, "choice": choices[-1] if choices else None,
    }  # fmt: skip


def overhead(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """Time rounds of a tree by itself and as the only one of a menu, in turns."""
    prompts, rows = held_out_pieces(model, options.count), []
    for tree in MENU:
        method = model.speculative(DecodingSpec(tree), SamplingConfig())
        menu, alone, within = Menu((method,)), [], []
        for turn in range(options.repeats + 1):
            a, b = (_round_ms(model, m, p, prompts, options.tokens) for m, p in ((method, None), (menu, _only(menu))))
            if turn:
                alone.append(a)
                within.append(b)
        ratios = [b / a - 1 for a, b in zip(alone, within, strict=True)]
        rows.append(
            {"tree": tree.name, "round_ms": spread(alone), "in_a_menu_ms": spread(within), "more": spread(ratios)}
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
    return {"prompts": options.count, "new_tokens": options.tokens, "rows": rows}


def compilation(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """Compile the default chain, then the whole menu, each in programs of its own and without a cache."""
    jax.config.update("jax_compilation_cache_dir", None)
    rows = {}
    trees: dict[str, TreeConfig | Literal["auto"]] = {"4/2/1": TreeConfig(2, 1, 4), "auto": "auto"}
    for name, tree in trees.items():
        model.programs = Programs()
        before = _resident_mb()
        result = model.generate([[0, 1, 2]], tree=tree, max_new_tokens=8)
        rows[name] = {
            "compile_s": round(result.compile_s, 2), "programs": len(model.programs),
            "resident_mb": round(_resident_mb() - before, 1),
        }  # fmt: skip
    return rows


def _rows(name: str, settings: dict[str, DecodingSpec], turns: Sequence[dict[Any, dict[str, Any]]]) -> list[Any]:
    seconds = {own: [turn[name, own]["s_per_token"] for turn in turns] for own in settings}
    rows = []
    for own in settings:
        fixed = [other for other in settings if "auto" not in other and _budget_name(other) == _budget_name(own)]
        fixed = list(dict.fromkeys(["plain", *fixed]))
        best = min(fixed, key=lambda other: statistics.median(seconds[other]))
        texts = np.median([turn[name, own]["by_text"] for turn in turns], axis=0)
        plain, best_texts = (
            np.min([np.median([turn[name, other]["by_text"] for turn in turns], axis=0) for other in others], axis=0)
            for others in (["plain"], fixed)
        )
        ratio = lambda base, own=own: spread([b / s for b, s in zip(seconds[base], seconds[own], strict=True)])  # noqa: E731
        rounds = turns[-1][name, own]["rounds"]
        rows.append({
            "prompts": name, "setting": own, "ms_per_token": spread([s * 1e3 for s in seconds[own]]),
            "over_plain": ratio("plain"), "best_fixed": best, "over_best_fixed": ratio(best),
            "worst_text_over_plain": round(float((plain / texts).min()), 3),
            "worst_text_over_its_best_fixed": round(float((best_texts / texts).min()), 3),
            "same_tokens_as_plain": turns[-1][name, own]["tokens"] == turns[-1][name, "plain"]["tokens"],
            "share_of_rounds": {k: round(v / sum(rounds.values()), 3) for k, v in rounds.items()},
        })  # fmt: skip
    return rows


def _budget_name(setting: str) -> str:
    return setting.partition(" B=")[2]


def _settings() -> dict[str, DecodingSpec]:
    """Plain decoding; every tree of the menu and the menu, exact and with a quarter of the experts."""
    specs = [DecodingSpec(tree, budget) for budget in (None, BudgetConfig(0.25)) for tree in (*MENU, "auto")]
    return {spec.name: spec for spec in (DecodingSpec(), *specs)}


def _sets(model: Model, options: argparse.Namespace) -> dict[str, list[list[int]]]:
    own = continued(model, held_out_pieces(model, options.count), LONGEST_PROMPT)
    return prompt_sets(model, options) | {OWN: [text[-LONGEST_PROMPT:] for text in own]}


def _only(menu: Menu[Any, Any]) -> Callable[[Model, Run[Any, Any, Any]], Any]:
    """Make the only tree of a menu the choice of every round."""

    def prepared(model: Model, run: Run[Any, Any, Any]) -> Any:
        def prepare(advance: Advance[MenuState], state: MenuState) -> MenuState:
            costs, gains = (model.programs.put(np.array(v, np.float32)) for v in ((np.inf, 1.0), (1.0, 1.0)))
            return model.programs.run(Menu.price, menu, model.speculative_params, state, costs, gains, donate=True)

        return prepare

    return prepared


def _round_ms(model: Model, method: Any, prepare: Any, prompts: Sequence[list[int]], new: int) -> float:
    """Milliseconds of a round, over all prompts."""
    seconds, rounds = 0.0, 0
    for prompt in prompts:
        run = Run(model.programs, method, model.speculative_params, Batch([prompt], [len(prompt) + new], (), 0))
        run.execute(prepare=prepare and prepare(model, run))
        seconds, rounds = seconds + run.decode_s, rounds + run.rounds
    return seconds / rounds * 1e3


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["speed", "overhead", "compile"], default="speed")
    parser.add_argument("--out", type=Path, help="directory of auto.json (default: print)")
    parser.add_argument("--cache", type=Path, help="directory of compiled programs; its costs of rounds are removed")
    parser.add_argument("--prompts", action="append", metavar="NAME=FILE", help="further sets (default: held-out)")
    parser.add_argument("--count", type=int, default=4, help="prompts of each set")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each prompt")
    parser.add_argument("--repeats", type=int, default=5, help="turns, after one that warms up")
    parser.add_argument("--seconds", type=float, default=400, help="time allowed")
    options = parser.parse_args()
    options.prompts, options.chat = ["held-out", *(options.prompts or [])], False
    options.longest_prompt = LONGEST_PROMPT
    return options


if __name__ == "__main__":
    sys.exit(main())
