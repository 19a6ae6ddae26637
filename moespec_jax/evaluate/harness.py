"""Models of this package in lm-evaluation-harness, under the name `moespec`:

    python -m moespec_jax.evaluate.lm_eval run --model moespec --tasks gsm8k \\
        --model_args pretrained=DIR,draft_model=HEAD,tree=60/7/10,expert_budget=48

Versions of lm-eval that look for plug-ins find it without us: `lm_eval run --model moespec ...`.

Texts are generated in the way that is asked for: plainly (`tree=none`), speculating, or under a budget. Log-likelihoods
come from a direct forward pass where nothing is budgeted, which is the distribution that exact speculation draws from,
and from verifying passes under the budget where something is (see `loglikelihood`). Every text is a batch of its own to
a budget, so that scores do not depend on `batch_size` (but by score `depth`, which counts what others committed).
"""
# pyright: reportMissingImports=false

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moespec_jax.cli.arguments import load_requested, requested_spec
from moespec_jax.cli.command import use_compilation_cache
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.errors import RequestError
from moespec_jax.evaluate.generation import continue_batch, cut_at
from moespec_jax.evaluate.loglikelihood import Text, score_batch
from moespec_jax.evaluate.model_args import read_model_args
from moespec_jax.evaluate.specs import evaluated_spec
from moespec_jax.runtime.results import device_name, versions

# Generation arguments that ask for nothing.
_NOTHING_SAID = (("num_beams", 1), ("num_return_sequences", 1))
# A continuation to score, as lm-eval hands it on: the two texts, and the two as token ids.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("moespec")
class MoespecLM(TemplateLM):
    """A target, alone or with its draft head, in one way of decoding. Arguments as in `model_args`.

    Raises:
        CheckpointError: the model cannot be loaded.
        RequestError: an argument is not what it must be.
    """

    def __init__(self, **model_args: Any):
        super().__init__()
        arguments = read_model_args(model_args)
        spec = requested_spec(arguments)
        use_compilation_cache(arguments.compilation_cache)
        self.model = load_requested(arguments, spec.budget)
        if self.model.tokenizer is None:
            raise RequestError(f"expected a tokenizer in {self.model.directory} to read tasks with; it has none")
        tree = None if arguments.plain else spec.tree
        self.evaluated = evaluated_spec(self.model, dataclasses.replace(spec, tree=tree))
        self.batch_size, self.seed = arguments.batch_size, arguments.seed
        self.max_length = arguments.max_length or self.model.config.context_length
        self.max_gen_toks, self.thinking = arguments.max_gen_toks, not arguments.no_thinking

    def get_model_info(self) -> dict[str, Any]:
        """What becomes part of the results' `config`: whether scores are the model's own, and what they are of."""
        spec, draft = self.evaluated.spec, self.model.draft
        through = "a direct forward pass" if spec.budget is None else "verifying passes under the budget"
        return self.evaluated.columns() | {
            "draft_model": None if spec.tree is None or draft is None else draft.name,
            "loglikelihood": through,
            "model_dtype": self.model.precision,
            "jax_device": device_name(),
            "versions": versions(),
        }

    @cached_property
    def tokenizer(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleUnannotatedOverride]
        """The checkpoint's, as transformers has it: special tokens and chat template."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self.model.directory), local_files_only=True, trust_remote_code=False)

    @property
    def tokenizer_name(self) -> str:
        """What cached requests are told apart by."""
        return str(self.model.directory).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.model.stop_ids[0] if self.model.stop_ids else self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context begins with."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds unless the text begins with them."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = begin is None or not string.startswith(begin)
        return self.model.encode(string, special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns in the checkpoint's chat template, ready for the answer or ending in the middle of one."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            enable_thinking=self.thinking,
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of `max_length`; the first begins with the prefix token."""
        windows: list[Request] = []
        of: list[int] = []
        for number, request in enumerate(requests):
            ids, prefix = self.tok_encode(request.args[0]), self.prefix_token_id
            for window in get_rolling_token_windows(ids, prefix, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                of.append(number)
        totals = [0.0] * len(requests)
        for number, (log_p, _) in zip(of, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += log_p
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Long texts first, so that what does not fit the memory fails at once; what differs in its last token only is
        scored together."""
        texts, places = _together(requests, self.max_length)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
        bar = tqdm(total=len(requests), desc="log-likelihoods", unit="request", disable=disable_tqdm)
        for batch in _chunks(order, self.batch_size):
            scores = score_batch(self.model, self.evaluated, [texts[i] for i in batch], self.batch_size)
            for i, scored in zip(batch, scores, strict=True):
                inner, greedy = sum(p for p, _ in scored.tokens), all(best for _, best in scored.tokens)
                for number, (log_p, best) in zip(places[i], scored.candidates, strict=True):
                    found[number] = (inner + log_p, greedy and best)
                    if (strings := requests[number][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", strings, found[number])
                bar.update(len(places[i]))
        bar.close()
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut before the first of the texts that end them."""
        ids = [self.tok_encode(request.args[0]) for request in requests]
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts, bar = [""] * len(requests), tqdm(total=len(requests), unit="request", disable=disable_tqdm)
        for group in groups.values():
            kwargs = read_gen_kwargs(requests[group[0]].args[1], self.max_gen_toks)
            for batch in _chunks(sorted(group, key=lambda i: -len(ids[i])), self.batch_size):
                for i, text in zip(batch, self._continue([ids[i] for i in batch], kwargs, batch[0]), strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update(len(batch))
        bar.close()
        return texts

    def _continue(self, prompts: list[list[int]], kwargs: "GenerationKwargs", number: int) -> list[str]:
        """One batch; a prompt too long for what may follow it loses its beginning."""
        room = self.max_length - kwargs.new
        if room < 1:
            raise RequestError(f"expected max_gen_toks below max_length of {self.max_length}; got {kwargs.new}")
        prompts = [prompt[-room:] for prompt in prompts]

        def over(i: int, ids: list[int]) -> bool:
            text = self.model.decode(ids) or ""
            return ids[-1:] in ([stop] for stop in self.model.stop_ids) or cut_at(text, kwargs.until) != text

        new = continue_batch(
            self.model, self.evaluated, prompts, kwargs.new, sampling=kwargs.sampling, seed=self.seed + number,
            over=over, size=self.batch_size,
        )  # fmt: skip
        texts = [self.model.decode(ids, after=prompt) or "" for prompt, ids in zip(prompts, new, strict=True)]
        return [cut_at(text, kwargs.until) for text in texts]


@dataclasses.dataclass(frozen=True)
class GenerationKwargs:
    """How to generate: at most `new` tokens, up to one of the texts `until`."""

    new: int
    until: tuple[str, ...]
    sampling: SamplingConfig


def read_gen_kwargs(given: dict[str, Any], default_new: int) -> GenerationKwargs:
    """A task's generation arguments.

    Raises:
        RequestError: one of them is not known here, or has no such value.
    """
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, default_new))
    until, new, sample = kwargs.pop("until"), kwargs.pop("max_gen_toks"), kwargs.pop("do_sample", False)
    temperature, top_k, top_p = kwargs.pop("temperature", 1.0), kwargs.pop("top_k", 0), kwargs.pop("top_p", 1.0)
    unknown = [name for name, value in kwargs.items() if (name, value) not in _NOTHING_SAID]
    if unknown:
        raise RequestError(
            "expected generation arguments until, max_gen_toks, do_sample, temperature, top_k and top_p;"
            f" got {', '.join(unknown)}"
        )
    try:
        sampling = SamplingConfig(float(temperature), int(top_k), float(top_p)) if sample else SamplingConfig()
    except ValueError as error:
        raise RequestError(str(error)) from None
    return GenerationKwargs(new, tuple(text for text in until if text), sampling)


def _together(requests: Sequence[Request], max_length: int) -> tuple[list[Text], list[list[int]]]:
    """Requests as texts, each of at most `max_length` tokens and one candidate or several, and whose they are."""
    texts: dict[tuple[Any, ...], tuple[Text, list[int]]] = {}
    for number, (_, context, continuation) in enumerate(requests):
        if not continuation:
            raise RequestError("expected continuations of at least one token; one is empty")
        whole = [*context, *continuation][-(max_length + 1) :]
        given = max(len(whole) - len(continuation), 1)
        text, places = texts.setdefault((given, *whole[:-1]), (Text(whole[:-1], given, []), []))
        text.candidates.append(whole[-1])
        places.append(number)
    return [text for text, _ in texts.values()], [places for _, places in texts.values()]


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
