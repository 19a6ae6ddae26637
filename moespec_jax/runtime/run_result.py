"""Fields of a result, from the run."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from tokenizers import Tokenizer

from moespec_jax.checkpoint.tokenizer import decode_after
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.nn.quantization import Quantization
from moespec_jax.runtime.results import PromptResult, device_name, exactness, logprobs_of, versions
from moespec_jax.runtime.run import Batch, Run
from moespec_jax.runtime.stop_strings import StopStrings
from moespec_jax.runtime.token_logprobs import token_logprobs


def as_requested(spec: DecodingSpec, exact: bool, dtype: str) -> dict[str, Any]:
    """Fields of `results.RunResult` that follow from a resolved spec."""
    return {
        "exact": exact,
        "exactness": exactness(exact, spec.tree, spec.budget, spec.simulate_accept_length, dtype),
        "budget": None if spec.budget is None else spec.budget.as_dict(),
        "tree": dataclasses.asdict(spec.tree) if isinstance(spec.tree, TreeConfig) else None,
        "simulated_accept_length": spec.simulate_accept_length,
        "logprobs_of": None if spec.logprobs is None else logprobs_of(exact, spec.budget, spec.adapt),
    }


def of_weights(dtype: jnp.dtype, quantization: Quantization | None, checkpoint_format: str | None) -> dict[str, Any]:
    """Fields of `results.RunResult` about the weights."""
    return {"dtype": str(dtype), "quantization": quantization, "checkpoint_format": checkpoint_format}


def environment(mesh: dict[str, int] | None) -> dict[str, Any]:
    """Fields of `results.RunResult` about devices and libraries."""
    return {"mesh": mesh, "device": device_name(), "versions": versions()}


def measurements(run: Run[Any, Any, Any], batch: Batch) -> dict[str, Any]:
    """Numbers of `results.RunResult`: means over rounds, and seconds."""
    mean = {name: total / max(run.rounds, 1) for name, total in run.sums.items()}
    # The first token of each comes with prefill.
    later = sum(len(ids) - len(prompt) - 1 for ids, prompt in zip(run.sequences, batch.prompts, strict=True))
    return {
        "experts_wanted": mean.get("experts_wanted", 0.0),
        "experts_read": mean.get("experts_read", mean.get("experts_wanted", 0.0)),
        "experts_max_per_device": mean.get("experts_max_per_device", 0.0),
        "mass_kept": mean.get("mass_kept", 1.0),
        "tokens_replaced": mean.get("replaced", 0.0),
        "compile_s": run.compile_s,
        "prefill_s": run.prefill_s,
        "decode_s": run.decode_s,
        "tokens_per_s": later / run.decode_s if run.decode_s else 0.0,
    }


def prompt_results(
    run: Run[Any, Any, Any],
    batch: Batch,
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
    stops: StopStrings | None,
) -> list[PromptResult]:
    """Make the result of every prompt."""
    return [
        _prompt_result(run, batch, number, tokenizer, max_new_tokens, stops) for number in range(len(batch.prompts))
    ]


def _prompt_result(
    run: Run[Any, Any, Any],
    batch: Batch,
    number: int,
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
    stops: StopStrings | None,
) -> PromptResult:
    prompt = batch.prompts[number]
    new = run.sequences[number][len(prompt) :]
    stopped = None if stops is None else stops.stopped[number]
    if stopped is not None:
        new, text, reason = new[: stopped.tokens], stopped.text, "stop string"
    else:
        text = None if tokenizer is None else decode_after(tokenizer, new, prompt)
        reason = "stop" if new[-1] in batch.stop_ids else "length" if len(new) == max_new_tokens else "context"
    rounds, found = int(run.active[number]), run.logprobs
    by_depth = (run.accepted[number] / max(rounds, 1)).tolist()
    return PromptResult(
        text=text,
        token_ids=new,
        prompt_tokens=len(prompt),
        new_tokens=len(new),
        rounds=rounds,
        accept_length=1.0 + sum(by_depth) if rounds else 0.0,
        accepted_by_depth=by_depth,
        finish_reason=reason,
        cached_tokens=run.cached_tokens,
        sample=number % batch.samples,
        logprobs=None if found is None else token_logprobs(found, number, new, len(prompt), tokenizer),
    )
