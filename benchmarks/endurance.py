"""Many tokens in one process: `python -m benchmarks.endurance --tokens 20000 --out benchmarks/results`.

The embedded pair generates a batch at a time, streaming; prompts are pieces of the held-out modules whose text and
length change with every run, and so do the ways to decode: greedily and sampled; plainly, drafting, and drafting under
a budget. One turn of all lengths and all ways warms up. From then on nothing may be compiled, neither a program of the
model nor anything else in the process, and resident memory is looked at after every run: its median over the last
quarter of the runs may be at most 3 % above that over the first.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.measure.prompt_sets import held_out_pieces
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import RunResult

NEW, BUDGET, GROWTH = 48, BudgetConfig(16), 0.03
# Either side of every length at which a prompt is read in other pieces.
LENGTHS = (1, 15, 40, 64, 65, 100, 130, 200)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"tree": None},
    "drafting": {},
    "drafting, budget": {"budget": BUDGET},
}
TEMPERATURES = (0.0, 0.8)
# Tokens of every length in every way.
ONE_TURN = len(LENGTHS) * len(WAYS) * len(TEMPERATURES) * NEW
_COMPILATION = "/jax/core/compile/backend_compile_duration"


class Look(NamedTuple):
    """What the process holds after a run: tokens generated so far, programs of the model, compilations, bytes."""

    tokens: int
    programs: int
    compilations: int
    resident: int


class Compilations:
    """Counts what XLA compiles in this process from now on, also what it finds in a cache on disk."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == _COMPILATION


def main() -> int:
    """Warm up, generate, and write `endurance.json`; status 1 where something grew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=20_000, help="to generate after the warm-up (20000)")
    parser.add_argument("--out", type=Path, help="directory to write endurance.json to (default: print)")
    options = parser.parse_args()
    compilations, model = Compilations(), load()
    pieces = held_out_pieces(model, 512, max(LENGTHS))
    started = time.perf_counter()
    warm = endure(model, pieces, compilations, ONE_TURN)
    warmed = time.perf_counter()
    looks = endure(model, pieces, compilations, options.tokens, first=1)
    report = summary(warm[-1], looks) | {
        "warm_up_s": round(warmed - started, 1),
        "seconds": round(time.perf_counter() - warmed, 1),
        **about(model),
    }
    text = json.dumps(report, indent=1) + "\n"
    print(text, end="") if options.out is None else (options.out / "endurance.json").write_text(text)
    grown = [name for name in ("programs", "compilations") if report[f"{name}_after_warm_up"]]
    grown += ["resident memory"] if report["growth"] > GROWTH else []
    if grown:
        print(f"error: expected nothing to grow after the warm-up; {', '.join(grown)} did", file=sys.stderr)
    return 1 if grown else 0


def endure(
    model: Model, pieces: list[list[int]], compilations: Compilations, tokens: int, first: int = 0
) -> list[Look]:
    """Generate at least so many tokens, a look after every run; `first` shifts which pieces and seeds come."""
    looks: list[Look] = []
    done = 0
    with tqdm(total=tokens, unit="token", disable=None) as bar:
        for result in runs(model, pieces, first):
            new = sum(prompt.new_tokens for prompt in result.prompts)
            done += new
            bar.update(new)
            looks.append(Look(done, len(model.programs), compilations.count, resident_bytes()))
            if done >= tokens:
                break
    return looks


def runs(model: Model, pieces: list[list[int]], first: int) -> Iterator[RunResult]:
    """Every length and every way in turns without end, each with another text and seed, streamed."""
    turns = itertools.cycle(itertools.product(LENGTHS, TEMPERATURES, WAYS.values()))
    for number, (length, temperature, way) in enumerate(turns):
        seed = first * 1_000 + number
        prompt, heard = pieces[seed % len(pieces)][:length], []
        result = model.generate(
            [prompt],
            max_new_tokens=NEW,
            temperature=temperature,
            seed=seed,
            ignore_eos=True,
            on_tokens=lambda new, heard=heard: heard.extend(new[0]),
            **way,
        )
        if heard != result.prompts[0].token_ids:
            raise SystemExit(f"error: expected to hear what was generated; heard {len(heard)} other tokens")
        yield result


def summary(warm: Look, looks: list[Look]) -> dict[str, Any]:
    """Figures of the runs after the warm-up."""
    quarter = max(1, len(looks) // 4)
    before, after = (statistics.median(look.resident for look in part) for part in (looks[:quarter], looks[-quarter:]))
    every = max(1, len(looks) // 10)
    return {
        "tokens": looks[-1].tokens,
        "runs": len(looks),
        "programs": warm.programs,
        "programs_after_warm_up": looks[-1].programs - warm.programs,
        "compilations": warm.compilations,
        "compilations_after_warm_up": looks[-1].compilations - warm.compilations,
        "resident_first_quarter_mb": round(before / 1e6, 1),
        "resident_last_quarter_mb": round(after / 1e6, 1),
        "growth": round(after / before - 1, 4),
        "resident_mb": {str(look.tokens): round(look.resident / 1e6, 1) for look in looks[::every]},
    }


def about(model: Model) -> dict[str, Any]:
    """Where and with what it ran."""
    result = model.generate([[0]], max_new_tokens=1)
    return {
        "lengths": list(LENGTHS),
        "new_tokens": NEW,
        "ways": list(WAYS),
        "temperatures": list(TEMPERATURES),
        "device": result.device,
        "dtype": result.dtype,
        "versions": result.versions,
    }


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
