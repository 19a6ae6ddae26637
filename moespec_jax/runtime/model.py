"""A loaded model, as `moespec_jax.load` returns it:

import moespec_jax
model = moespec_jax.load()                      # the embedded model; or a directory, or a hub id
print(model.generate("def fibonacci(n):").prompts[0].text)
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from moespec_jax.checkpoint.chat import render_messages
from moespec_jax.checkpoint.generation_config import PublishedSampling
from moespec_jax.checkpoint.tokenizer import decode_after
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.budget_config import BudgetConfig, is_exact
from moespec_jax.decoding.cost_table import CostTable
from moespec_jax.decoding.drafter import Drafter, SpeculativeParams
from moespec_jax.decoding.menu import Menu
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.decoding.speculative import Adapt, Speculative
from moespec_jax.errors import RequestError, wrong_type
from moespec_jax.nn.backend import Backend, expert_form
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.quantization import Quantization
from moespec_jax.runtime.drafters import Draft, described, drafter_of
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.prompt_cache import PromptCache, usable
from moespec_jax.runtime.request import (
    are_messages,
    check_not_traced,
    check_ranges,
    check_types,
    known_ids,
    listed_prompts,
    sequence_limits,
)
from moespec_jax.runtime.requested_sampling import SamplingOptions, describe_sampling, requested_sampling
from moespec_jax.runtime.results import RunResult, device_name, versions
from moespec_jax.runtime.round_costs import Chooser, RoundCosts, are_known, known_by, with_shapes
from moespec_jax.runtime.run import Batch, OnRound, OnTokens, Run
from moespec_jax.runtime.run_result import as_requested, environment, measurements, of_weights, prompt_results
from moespec_jax.runtime.samples import with_samples
from moespec_jax.runtime.specs import NOTHING_DRAFTED, menu_trees, resolved_spec
from moespec_jax.runtime.stop_strings import StopStrings, listed_stops

# Texts, token ids, or messages of one conversation.
Prompts = str | Sequence[str] | Sequence[Sequence[int]] | Sequence[Mapping[str, Any]]


@dataclasses.dataclass
class Model:
    """A loaded decoder.

    Fields:
        config: its settings.
        params: its parameters, in the layout of the back-end.
        backend: expert compute and attention.
        dtype: of weights and activations.
        tokenizer: None for token ids only.
        stop_ids: token ids that end a sequence.
        directory: where it was loaded from.
        draft: draft head, or drafter by name, if there is one.
        programs: compiled programs.
        quantization: of the routed experts.
        checkpoint_format: in which the checkpoint's weights are quantized; None for plain weights.
        published_sampling: how tokens are drawn where a request leaves it open.
        round_costs: costs of the rounds of menus that were measured, or read from files.
    """

    config: DecoderConfig
    params: Decoder
    backend: Backend
    dtype: jnp.dtype
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    directory: Path
    draft: Draft | None = None
    programs: Programs = dataclasses.field(default_factory=Programs)
    quantization: Quantization | None = None
    published_sampling: PublishedSampling = PublishedSampling()
    round_costs: dict[str, RoundCosts] = dataclasses.field(default_factory=dict)
    checkpoint_format: str | None = None

    def __repr__(self) -> str:
        draft = described(None if self.draft is None else self.draft.name)
        return (
            f"Model({self.config.model_type} from {self.directory}, {draft}, {self.precision}, {self.backend.name},"
            f" {self.params!r})"
        )

    @property
    def precision(self) -> str:
        """Dtype of the weights, and quantization of the experts."""
        return str(self.dtype) if self.quantization is None else f"{self.dtype}, {self.quantization} experts"

    @property
    def expert_form(self) -> str:
        """Expert compute that runs: the back-end's, or its fallback with the reason."""
        device = jax.devices()[0] if self.programs.mesh is None else self.programs.mesh.devices.flat[0]
        return expert_form(
            self.backend, self.config.expert_activation, self.params.experts, self.dtype, device.platform
        )

    def encode(self, prompt: str, *, special_tokens: bool = True) -> list[int]:
        """Tokenize a prompt, by default with the special tokens that the tokenizer adds.

        Raises:
            RequestError: there is no tokenizer, or the prompt is not valid text or has a token outside the vocabulary.
        """
        if not isinstance(prompt, str):
            raise wrong_type("a prompt", "text", prompt)
        if self.tokenizer is None:
            raise RequestError(f"expected token ids (--prompt-ids): {self.directory} has no tokenizer")
        # Surrogates: bytes of a command line that are not UTF-8.
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise RequestError(f"expected a prompt of valid UTF-8 text, got {prompt[:40]!r}")
        return known_ids(self.config, self.tokenizer, self.tokenizer.encode(prompt, add_special_tokens=special_tokens))

    def decode(self, token_ids: Sequence[int], after: Sequence[int] = ()) -> str | None:
        """Decode token ids, without special tokens; None without a tokenizer.

        `after` are the ids that precede them: some tokenizers drop a leading space at the start of a text.
        """
        return None if self.tokenizer is None else decode_after(self.tokenizer, token_ids, after)

    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 128,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        max_length: int | None = None,
        tree: TreeConfig | Literal["default", "auto"] | CostTable | None = "default",
        budget: BudgetConfig | int | float | None = None,
        samples: int = 1,
        logprobs: int | None = None,
        simulate_accept_length: float | None = None,
        drafter: Drafter[Any, Any] | None = None,
        prompt_cache: PromptCache | None = None,
        adapt: Adapt | None = None,
        on_tokens: OnTokens | None = None,
        on_round: OnRound | None = None,
        **options: Unpack[SamplingOptions],
    ) -> RunResult:
        """Continue one or several prompts as one batch.

        Args:
            prompts: text, or lists of token ids; or messages with `role` and `content`, one conversation.
            max_new_tokens: of each prompt.
            seed: of all random draws. The same seed gives the same text with any tree and without one.
            stop: texts; a continuation ends before the first of them that it has.
            ignore_eos: generate beyond the model's stop ids.
            max_length: longest sequence in tokens (default: the model's context).
            tree: shape of the draft tree; None decodes plainly, and with "auto" every round is plain or drafts the tree
                that pays most by the costs measured on this device, or by those of `read_costs`. The default is "auto"
                where those were measured before and there is no budget, else the drafter's; without one it is None.
            budget: experts that a layer may read in a verification, which makes the output lossy; a number stands for
                the default rule.
            samples: number of continuations of each prompt, which is read once; the result is that of a batch in which
                the prompt occurs so often in succession, with `PromptResult.sample` from 0.
            logprobs: return every token's log-probability, and so many most probable tokens with theirs, by raw logits.
            simulate_accept_length: accept this many tokens a round on average, for timing; the text is meaningless.
            drafter: in place of the draft head.
            prompt_cache: keeps the state for the next call, whose prompt may begin with this one and its continuation;
                unused with dynamic rotary scaling, where a prompt's rows depend on the length of the later text.
            adapt: replaces functions of the round (`speculative.Speculative`); the result is then not called exact.
            on_tokens: called with every sequence's new ids about ten times a second, or once a round if that is slower.
            on_round: called with the measurements of every round.
            options: how tokens are drawn, as in `SamplingConfig`: `temperature` (0 is greedy), `top_k`, `top_p`,
                `min_p`, `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `logits_processor`. Those
                that are not given are the checkpoint's (`generation_config.json`), and greedy where it has none.

        Warns:
            BudgetWarning: the budget is so tight that quality is likely to suffer.

        Raises:
            RequestError: an argument has a wrong type; a prompt is empty, holds an unknown id or fills the context; a
                number is out of range; a tree, a budget or a round's measurements are asked for where nothing is
                drafted; or the call is inside a transformation of JAX.
            CheckpointError: logits are not finite, because weights are not, or are too large for their dtype.
        """
        settings = (max_new_tokens, seed, *options.values())
        check_not_traced("generate", prompts, settings, self.speculative_params)
        check_types(
            max_new_tokens=max_new_tokens, seed=seed, max_length=max_length, tree=tree, budget=budget, samples=samples,
            logprobs=logprobs, simulate_accept_length=simulate_accept_length, adapt=adapt, on_tokens=on_tokens,
            on_round=on_round,
        )  # fmt: skip
        try:
            sampling = requested_sampling(self.published_sampling, options)
            budget = budget if budget is None or isinstance(budget, BudgetConfig) else BudgetConfig(budget)
        except ValueError as error:
            raise RequestError(str(error)) from None
        check_ranges(self.config, seed, logprobs)
        ids = self._token_ids(prompts)
        limit = sequence_limits(self.config, ids, max_new_tokens, max_length)
        ids, limit = with_samples(ids, samples), with_samples(limit, samples)
        batch = Batch(ids, limit, () if ignore_eos else self.stop_ids, seed, int(samples))
        spec = DecodingSpec(tree, budget, simulate_accept_length, drafter, adapt, logprobs)
        spec = self.resolve(self._chosen_by_default(spec, len(ids)))
        if spec.tree is None and on_round is not None:
            raise RequestError(NOTHING_DRAFTED)
        texts = listed_stops(stop, self.tokenizer)
        stops = StopStrings(texts, self.tokenizer, ids) if texts and self.tokenizer is not None else None
        cache = usable(prompt_cache, self.config, (self.programs, dataclasses.replace(spec, logprobs=None)))
        run, chooser = self._run(spec, sampling, batch, cache)
        run.execute(
            on_tokens if stops is None else stops.before(on_tokens),
            with_shapes(on_round, spec.tree, chooser),
            None if chooser is None else chooser.prepare,
            (lambda: False) if stops is None else stops.all_stopped,
            None if chooser is None else chooser.first_parts,
        )
        return RunResult(
            prompts=prompt_results(run, batch, self.tokenizer, max_new_tokens, stops),
            samples=batch.samples,
            greedy=sampling.greedy,
            sampling=describe_sampling(sampling, self.published_sampling, options),
            draft_model=self.drafter_name(spec),
            backend=self.expert_form,
            choice=None if chooser is None else chooser.report(),
            **of_weights(self.dtype, self.quantization, self.checkpoint_format),
            **as_requested(spec, self.is_exact(spec, len(ids)), str(self.dtype)),
            **environment(self.programs.mesh_sizes),
            **measurements(run, batch),
        )

    def _run(
        self, spec: DecodingSpec, sampling: SamplingConfig, batch: Batch, cache: PromptCache | None
    ) -> tuple[Run[Any, Any, Any], Chooser | None]:
        """Make the run of a batch by a resolved spec and, where rounds choose their shape, what chooses."""
        if spec.tree is None:
            return Run(self.programs, self.autoregressive(sampling, spec.logprobs), self.params, batch, cache), None
        params = self.speculative_params
        if not spec.chooses:
            return Run(self.programs, self.speculative(spec, sampling), params, batch, cache), None
        trees = [dataclasses.replace(spec, tree=tree) for tree in menu_trees(self.draft, spec)]
        menu = Menu(tuple(self.speculative(tree, sampling) for tree in trees))
        run, identity = Run(self.programs, menu, params, batch, cache), self.costs_identity(spec, len(batch.prompts))
        return run, Chooser(menu, params, run, self.programs, identity, known_by(spec.tree, identity, self.round_costs))

    def resolve(self, spec: DecodingSpec) -> DecodingSpec:
        """Check a spec against this model, and complete it: the default tree, and the budget of each layer.

        Warns:
            BudgetWarning: the budget is so tight that quality is likely to suffer.

        Raises:
            RequestError: the model cannot decode so.
        """
        return resolved_spec(self.config, self.draft, self.directory, spec)

    def is_exact(self, spec: DecodingSpec, batch: int) -> bool:
        """Test whether a resolved spec leaves the distribution of the output that of the model, for `batch` prompts."""
        if spec.simulate_accept_length is not None or spec.adapt is not None:
            return False
        return spec.budget is None or is_exact(spec.budget, self.config, batch)

    def autoregressive(self, sampling: SamplingConfig, logprobs: int | None = None) -> Autoregressive:
        """Plain decoding, which may record log-probabilities."""
        return Autoregressive(self.config, sampling, self.backend, logprobs=logprobs)

    def speculative(self, spec: DecodingSpec, sampling: SamplingConfig) -> Speculative[Any, Any]:
        """Speculative decoding by a resolved spec; its drafter has parameters and a state of its own kind."""
        assert isinstance(spec.tree, TreeConfig)
        drafter = spec.drafter
        if drafter is None:
            assert self.draft is not None
            drafter = drafter_of(self.draft, self.config, self.backend)
        accept = accept_rule(sampling, spec.tree.longest_path, spec.simulate_accept_length)
        method = Speculative(self.autoregressive(sampling, spec.logprobs), drafter, spec.tree, accept, spec.budget)
        return method if spec.adapt is None else spec.adapt(method)

    @property
    def speculative_params(self) -> SpeculativeParams[Any]:
        """Parameters of speculative decoding: the target's, and the head's if there is one."""
        return SpeculativeParams(self.params, () if self.draft is None else self.draft.head)

    def _token_ids(self, prompts: Prompts) -> list[list[int]]:
        if are_messages(prompts):
            return [self.encode(render_messages(self.directory, prompts), special_tokens=False)]
        return [self.encode(p) if isinstance(p, str) else p for p in listed_prompts(prompts)]

    def _chosen_by_default(self, spec: DecodingSpec, batch: int) -> DecodingSpec:
        """Let every round choose its shape where no tree is asked for and the costs of rounds are known."""
        auto = DecodingSpec("auto", logprobs=spec.logprobs)
        free = spec == dataclasses.replace(auto, tree="default") and self.draft is not None
        return auto if free and are_known(self.costs_identity(auto, batch), self.round_costs) else spec

    def costs_identity(self, spec: DecodingSpec, batch: int) -> dict[str, Any]:
        """List what the costs of rounds depend on."""
        return {
            "model": str(self.directory.resolve()), "config": repr(self.config),
            "draft_model": self.drafter_name(spec), "precision": self.precision, "backend": self.expert_form,
            "batch": batch, "shapes": [tree.name for tree in menu_trees(self.draft, spec)],
            "budget": None if spec.budget is None else spec.budget.as_dict(),
            "mesh": self.programs.mesh_sizes,
            "device": device_name(), "cores": os.cpu_count(), "versions": versions(),
        }  # fmt: skip

    def drafter_name(self, spec: DecodingSpec) -> str | None:
        """Name of what drafts by a resolved spec; None in plain decoding."""
        if spec.tree is None:
            return None
        if spec.drafter is not None:
            return type(spec.drafter).__name__
        return None if self.draft is None else self.draft.name
