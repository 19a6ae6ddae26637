"""A loaded model from Python: batches, stops, streams, seeds, and what compiles when."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONTEXT, byte_fallback_tokenizer, write_tiny

import moespec_jax
import moespec_jax.decoding.autoregressive
import moespec_jax.runtime.run
from moespec_jax.errors import RequestError
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.nn.decoder import forward, unembed
from moespec_jax.runtime.model import Model

pytestmark = pytest.mark.usefixtures("fast_compile")

PROMPTS = [[5, 17, 9], [40] * 3 + list(range(60, 72)), [7], [200, 3, 3, 8, 41]]  # all of one bucket


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return moespec_jax.load(str(write_tiny(tmp_path_factory.mktemp("model"))))


def greedy(model: Model, prompt: Sequence[int], count: int = 24, **more: object) -> list[int]:
    return model.generate([prompt], max_new_tokens=count, **more).prompts[0].token_ids


def test_three_lines(model: Model) -> None:
    loaded = moespec_jax.load(str(model.directory))
    assert isinstance(loaded.generate("def fibonacci(n):", max_new_tokens=3).prompts[0].text, str)


def test_greedy_is_the_argmax_of_a_fresh_forward_pass(model: Model) -> None:
    """Without cache, buckets, padding or loop: every token anew from all tokens before it."""
    loaded = moespec_jax.load(str(model.directory), backend=BACKENDS["switch"])

    @jax.jit
    def next_tokens(tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        mask = causal_mask(positions, tokens.shape[1])
        hidden, _, _ = forward(loaded.config, loaded.params, tokens, positions, mask, None, loaded.backend)
        return jnp.argmax(unembed(loaded.params, hidden), axis=-1)[0]

    sequence, prompt = np.zeros((1, 40), np.int32), PROMPTS[0]
    sequence[0, : len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + 24):
        sequence[0, length] = next_tokens(sequence)[length - 1]  # the mask hides the zeros to its right
    expected = sequence[0, len(prompt) : len(prompt) + 24].tolist()
    assert len(set(expected)) > 8  # or the law would hold of a model that repeats itself
    assert greedy(loaded, prompt, ignore_eos=True) == expected
    slots = moespec_jax.load(str(model.directory), backend=BACKENDS["slots"])
    assert greedy(slots, prompt, ignore_eos=True) == expected


@pytest.mark.slow
def test_a_batch_gives_each_prompt_its_solo_output(model: Model) -> None:
    batch = model.generate(PROMPTS, max_new_tokens=24, ignore_eos=True)
    for prompt, result in zip(PROMPTS, batch.prompts, strict=True):
        assert result.token_ids == greedy(model, prompt, ignore_eos=True)
        assert result.prompt_tokens == len(prompt)


def test_prompts_of_one_and_of_several_chunks_in_a_batch(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in chunks of 16, the longest in three, the others done in the first or exactly with the second."""
    random = np.random.default_rng(0)
    prompts = [random.integers(1, 300, n).tolist() for n in (5, 32, 40, 16)]
    whole = [greedy(model, prompt, 6, ignore_eos=True) for prompt in prompts]
    monkeypatch.setattr(moespec_jax.decoding.autoregressive, "PREFILL_CHUNK", 16)
    batch = model.generate(prompts, max_new_tokens=6, ignore_eos=True)
    assert [p.token_ids for p in batch.prompts] == whole


def test_each_sequence_stops_for_itself(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [greedy(model, prompt, ignore_eos=True) for prompt in PROMPTS]
    # A stop id that the first sequence writes in its middle, before anything repeats.
    at = next(i for i in range(6, 24) if free[0][i] not in free[0][:i])
    monkeypatch.setattr(model, "stop_ids", (free[0][at], 319))
    results = model.generate(PROMPTS, max_new_tokens=24).prompts
    for tokens, result in zip(free, results, strict=True):
        hits = [i for i, token in enumerate(tokens) if token in model.stop_ids]
        assert result.token_ids == tokens[: hits[0] + 1 if hits else None]
        assert result.finish_reason == ("stop" if hits else "length")
        assert (result.new_tokens, result.rounds) == (len(result.token_ids), len(result.token_ids) - 1)
    assert {result.finish_reason for result in results} == {"stop", "length"}


def test_a_stop_id_may_come_first(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = greedy(model, PROMPTS[0], 1, ignore_eos=True)
    monkeypatch.setattr(model, "stop_ids", tuple(first))
    result = model.generate(PROMPTS[:1]).prompts[0]
    assert (result.token_ids, result.finish_reason, result.rounds) == (first, "stop", 0)


def test_ignore_eos_goes_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    free = greedy(model, PROMPTS[0], ignore_eos=True)
    monkeypatch.setattr(model, "stop_ids", (free[4],))
    assert greedy(model, PROMPTS[0]) == free[: free.index(free[4]) + 1]
    assert greedy(model, PROMPTS[0], ignore_eos=True) == free


@pytest.mark.parametrize(
    ("prompt_tokens", "max_new_tokens", "max_length", "new_tokens", "reason"),
    [
        (CONTEXT - 5, 50, None, 5, "context"),
        (CONTEXT - 5, 5, None, 5, "length"),
        (CONTEXT - 1, 50, None, 1, "context"),
        (3, 50, 20, 17, "context"),
        (3, 1, None, 1, "length"),
        (3, 10**12, 20, 17, "context"),
    ],
)
def test_the_end_of_the_context(
    model: Model, prompt_tokens: int, max_new_tokens: int, max_length: int | None, new_tokens: int, reason: str
) -> None:
    prompt = (PROMPTS[1] * 7)[:prompt_tokens]
    run = model.generate([prompt], max_new_tokens=max_new_tokens, max_length=max_length, ignore_eos=True)
    assert (run.prompts[0].new_tokens, run.prompts[0].finish_reason) == (new_tokens, reason)


SAMPLINGS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 4},
}


@pytest.mark.parametrize("interval", [1e-9, 2e-3, 10.0], ids=["one by one", "some", "many"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_streaming_changes_nothing(
    model: Model, sampling: dict[str, float], interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moespec_jax.runtime.run, "_STREAM_INTERVAL_S", interval)
    whole = model.generate(PROMPTS, max_new_tokens=24, **sampling)
    calls: list[list[list[int]]] = []
    streamed = model.generate(PROMPTS, max_new_tokens=24, on_tokens=calls.append, **sampling)
    assert [p.token_ids for p in streamed.prompts] == [p.token_ids for p in whole.prompts]
    for row, prompt in enumerate(streamed.prompts):
        assert [token for call in calls for token in call[row]] == prompt.token_ids
    if interval == 1e-9:
        assert all(len(new) <= 1 for call in calls for new in call)


def test_a_seed_repeats_and_seeds_differ(model: Model) -> None:
    def drawn(seed: int) -> list[int]:
        return greedy(model, PROMPTS[0], temperature=1.0, seed=seed, ignore_eos=True)

    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(seed)) for seed in range(5)}) == 5


def test_rows_of_a_batch_draw_apart_from_each_other(model: Model) -> None:
    def drawn(*prompts: list[int]) -> list[list[int]]:
        run = model.generate(prompts, max_new_tokens=24, temperature=1.0, seed=1, ignore_eos=True)
        return [p.token_ids for p in run.prompts]

    same, other = drawn(PROMPTS[0], PROMPTS[0], *PROMPTS[2:]), drawn(PROMPTS[1], PROMPTS[0], *PROMPTS[:2])
    assert same[0] != same[1]  # the same prompt twice is two samples
    assert same[1] == other[1]  # and neighbours do not matter
    assert drawn(PROMPTS[0]) == same[:1]


def test_top_k_of_one_is_greedy(model: Model) -> None:
    assert greedy(model, PROMPTS[0], temperature=1.0, top_k=1, seed=9) == greedy(model, PROMPTS[0])


def test_nothing_compiles_twice(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = moespec_jax.load(str(model.directory))
    assert first.generate([PROMPTS[0]], max_new_tokens=5, temperature=1.0).compile_s > 0
    programs = len(first.programs)
    for stop_ids, prompt, more in [
        ((0,), PROMPTS[3], {"seed": 5}),
        ((1, 2, 3), list(range(1, 17)), {"max_new_tokens": 40}),
        ((), PROMPTS[2], {"ignore_eos": True, "max_length": 30}),
        ((4,), PROMPTS[0], {"on_tokens": lambda new: None}),
    ]:
        monkeypatch.setattr(first, "stop_ids", stop_ids)
        assert first.generate([prompt], temperature=1.0, **more).compile_s == 0.0
    assert len(first.programs) == programs
    first.generate([list(range(1, 18))], max_new_tokens=5, temperature=1.0)  # a longer prompt's bucket
    assert len(first.programs) == programs + 1


def test_the_figures_of_a_run(model: Model) -> None:
    run = model.generate(PROMPTS, max_new_tokens=24, ignore_eos=True)
    assert run.tokens_per_s * run.decode_s == pytest.approx(len(PROMPTS) * 23)
    assert (run.exact, run.budget, run.tree, run.mass_kept, run.tokens_replaced) == (True, None, None, 1.0, 0.0)
    # A batch of four, two experts each, of four there are.
    assert 2.0 <= run.experts_wanted <= 4.0 and run.experts_read == run.experts_wanted
    alone = model.generate(PROMPTS[:1], max_new_tokens=24, ignore_eos=True)
    assert alone.experts_wanted == 2.0


def test_prompt_and_text_read_on(model: Model) -> None:
    """The continuation's text is what follows the prompt's text when both are decoded together."""
    for prompt in ("ab a", "the cat sat", "a"):
        result = model.generate(prompt, max_new_tokens=24, ignore_eos=True).prompts[0]
        together = model.decode([*model.encode(prompt), *result.token_ids])
        assert result.text is not None and prompt + result.text == together


def test_a_space_after_the_prompt_is_not_lost(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    tokenizer = byte_fallback_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = moespec_jax.load(str(tmp_path))
    word = tokenizer.token_to_id("▁ab")
    assert loaded.decode([word]) == "ab"
    assert loaded.decode([word], after=[word]) == " ab"


def test_a_dtype_is_kept(model: Model) -> None:
    loaded = moespec_jax.load(str(model.directory), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype("bfloat16")}
    run = loaded.generate([PROMPTS[0]], max_new_tokens=4, ignore_eos=True)
    assert (run.dtype, run.prompts[0].new_tokens) == ("bfloat16", 4)


def test_no_prompts_are_refused(model: Model) -> None:
    with pytest.raises(RequestError, match="expected at least one prompt"):
        model.generate([])


def test_prefill_is_compiled_once_for_every_way_of_sampling(model: Model) -> None:
    fresh = moespec_jax.load(str(model.directory))
    fresh.generate([PROMPTS[0]], max_new_tokens=4)
    programs = len(fresh.programs)
    fresh.generate([PROMPTS[0]], max_new_tokens=4, temperature=0.5)
    assert len(fresh.programs) == programs + 2  # the first token's draw and the loop, not the prompt


@pytest.mark.slow
def test_a_large_batch_gives_each_prompt_its_solo_output(model: Model) -> None:
    prompts = [[1 + i, *PROMPTS[i % len(PROMPTS)]] for i in range(11)]
    run = model.generate(prompts, max_new_tokens=6, ignore_eos=True)
    assert [p.token_ids for p in run.prompts] == [greedy(model, p, 6) for p in prompts]


@pytest.mark.slow_except("yarn-256")
@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, CONTEXT),
        ({"rope_type": "linear", "factor": 2.0}, 2 * CONTEXT),
        ({"rope_type": "dynamic", "factor": 2.0}, 2 * CONTEXT),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        # Files of this kind state the extended length already.
        (
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8, "high_freq_factor": 4.0},
            CONTEXT,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_a_rotary_scaling_extends_the_context(tmp_path: Path, rope: dict[str, object], context: int) -> None:
    loaded = moespec_jax.load(str(write_tiny(tmp_path, rope_parameters={"rope_theta": 10_000.0, **rope})))
    assert loaded.config.context_length == context
    with pytest.raises(RequestError, match=f"context of {context} tokens"):
        loaded.generate([[1] * context])
    run = loaded.generate([[1] * (context - 2)], max_new_tokens=9, ignore_eos=True)
    assert (run.prompts[0].new_tokens, run.prompts[0].finish_reason) == (2, "context")
