"""Stop strings: against a search of the whole text, in pieces of any size."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from moespec_jax.errors import RequestError
from moespec_jax.generate import main
from moespec_jax.runtime.load import DEMO_TARGET, load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.stop_strings import StopStrings, listed_stops, printable

TOKENIZER = Tokenizer.from_file(str(Path(DEMO_TARGET) / "tokenizer.json"))
TEXT = "def größe(x):\n    return [x for x in range(10)]\n\n\nclass Größe:\n    pass\n"


@pytest.fixture(scope="module")
def model() -> Model:
    return load()


@pytest.mark.parametrize("stops", [["return"], ["\n\n"], ["öße:"], ["zzz", "range(1"], ["x", "for"], ["no such text"]])
@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_the_first_stop_string_ends_the_text(stops: list[str], piece: int) -> None:
    """Two sequences of one batch, of which the second is one token behind."""
    ids = TOKENIZER.encode(TEXT).ids
    prompts = [ids[:2], ids[:1]]
    search, kept = StopStrings(stops, TOKENIZER, prompts), [list[int](), list[int]()]
    whole = [TOKENIZER.decode(ids)[len(TOKENIZER.decode(prompt)) :] for prompt in prompts]

    def collect(new: list[list[int]]) -> None:
        for own, more in zip(kept, new, strict=True):
            own += more

    push = search.before(collect)
    for start in range(0, len(ids), piece):
        push([ids[2:][start : start + piece], ids[1:][start : start + piece]])
    for number, (text, prompt) in enumerate(zip(whole, prompts, strict=True)):
        places = [text.find(stop) for stop in stops if stop in text]
        stopped = search.stopped[number]
        if not places:
            assert stopped is None and kept[number] == ids[len(prompt) :]
            continue
        assert stopped is not None and stopped.text == text[: min(places)]
        assert kept[number] == ids[len(prompt) :][: stopped.tokens]
        # The last token is the one that completes a stop string.
        before, after = (TOKENIZER.decode([*prompt, *kept[number][:n]]) for n in (stopped.tokens - 1, stopped.tokens))
        count = len(TOKENIZER.decode(prompt))
        assert any(s in after[count:] for s in stops) and not any(s in before[count:] for s in stops)


def test_what_may_be_printed_never_holds_part_of_a_stop_string() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=rng.randint(0, 8)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 2))]
        count = printable(text, stops)
        if any(stop in text for stop in stops):  # it has ended, although a longer one may have begun before
            assert count == min(text.find(stop) for stop in stops if stop in text)
            continue
        endings = ["".join(rng.choices("ab", k=6)) for _ in range(6)] + [s[i:] for s in stops for i in range(len(s))]
        firsts = [min((f for s in stops if (f := (text + end).find(s)) >= 0), default=99) for end in endings]
        assert all(count <= first for first in firsts)
        # And no less than that: the next character would be wrong for some ending.
        assert count == len(text) or count in firsts


def test_a_generation_ends_before_the_stop_string(model: Model) -> None:
    whole = model.generate("def fibonacci(n):", max_new_tokens=60).prompts[0]
    assert whole.text is not None
    stop = whole.text[30:36]
    first = model.generate("def fibonacci(n):", max_new_tokens=60, stop=stop).prompts[0]
    assert first.text == whole.text[: whole.text.find(stop)] and first.finish_reason == "stop string"
    assert first.token_ids == whole.token_ids[: first.new_tokens] and first.new_tokens < 60
    both = model.generate(["def fibonacci(n):", "import os"], max_new_tokens=60, stop=[stop, "no such text"]).prompts
    assert both[0].text == first.text and both[0].token_ids == first.token_ids
    assert stop not in (both[1].text or "") and both[1].finish_reason in ("stop string", "length")


def test_the_command_prints_nothing_of_it(capsys: pytest.CaptureFixture[str], model: Model) -> None:
    whole = model.generate("import os", max_new_tokens=40).prompts[0].text
    assert whole is not None
    stop = whole[20:26]
    assert main(["--prompt", "import os", "--max-new-tokens", "40", "--stop", stop, "--stop", "no such text"]) == 0
    assert capsys.readouterr().out == "import os" + whole[: whole.find(stop)] + "\n"


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(RequestError, match="expected a model with a tokenizer for stop strings; it has none"):
        listed_stops("a", None)
