"""A loaded model, as `moespec_jax.load` returns it:

import moespec_jax
model = moespec_jax.load()                      # the embedded model; or a directory, or a hub id
print(model.generate("def fibonacci(n):").prompts[0].text)
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from moespec_jax.checkpoint.head.read import LoadedDraft
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.budget_config import BudgetConfig, is_exact
from moespec_jax.decoding.drafter import Drafter, SpeculativeParams
from moespec_jax.decoding.eagle3_drafter import Eagle3Drafter
from moespec_jax.decoding.menu import Menu
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.decoding.speculative import Adapt, Speculative
from moespec_jax.errors import RequestError, wrong_type
from moespec_jax.nn.backend import Backend, expert_form
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.quantization import Quantization
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.request import check_not_traced, check_types, known_ids, listed_prompts, sequence_limits
from moespec_jax.runtime.results import PromptResult, RunResult, device_name, exactness, versions
from moespec_jax.runtime.round_costs import Chooser, RoundCosts
from moespec_jax.runtime.run import Batch, OnRound, OnTokens, Run
from moespec_jax.runtime.specs import NOTHING_DRAFTED, menu_trees, resolved_spec


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
        draft: draft head, if there is one.
        programs: compiled programs.
        quantization: of the routed experts.
        round_costs: costs of the rounds of menus that were measured, or read from files.
    """

    config: DecoderConfig
    params: Decoder
    backend: Backend
    dtype: jnp.dtype
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    directory: Path
    draft: LoadedDraft | None = None
    programs: Programs = dataclasses.field(default_factory=Programs)
    quantization: Quantization | None = None
    round_costs: dict[str, RoundCosts] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        draft = "no draft head" if self.draft is None else f"draft head {self.draft.name}"
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
        return expert_form(self.backend, self.config.hidden_act, self.params.experts, self.dtype, device.platform)

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
        if self.tokenizer is None:
            return None
        before = self.tokenizer.decode(list(after), skip_special_tokens=True)
        whole = self.tokenizer.decode([*after, *token_ids], skip_special_tokens=True)
        if whole.startswith(before):
            return whole[len(before) :]
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        ignore_eos: bool = False,
        max_length: int | None = None,
        tree: TreeConfig | Literal["default", "auto"] | None = "default",
        budget: BudgetConfig | int | float | None = None,
        simulate_accept_length: float | None = None,
        drafter: Drafter[Any, Any] | None = None,
        adapt: Adapt | None = None,
        on_tokens: OnTokens | None = None,
        on_round: OnRound | None = None,
    ) -> RunResult:
        """Continue one or several prompts as one batch.

        Args:
            prompts: text, or lists of token ids.
            max_new_tokens: of each prompt.
            temperature: 0 is greedy.
            top_k: draw from the k most probable tokens; 0 is all.
            top_p: draw from the smallest set of most probable tokens that holds this probability.
            seed: of all random draws. The same seed gives the same text with any tree and without one.
            ignore_eos: generate beyond the model's stop ids.
            max_length: longest sequence in tokens (default: the model's context).
            tree: shape of the draft tree; None decodes plainly, and with "auto" every round is plain or drafts the tree
                that pays most by the costs measured on this device. Models without a draft head decode plainly by
                default.
            budget: experts that a layer may read in a verification, which makes the output lossy; a number stands for
                the default rule.
            simulate_accept_length: accept this many tokens a round on average, for timing; the text is meaningless.
            drafter: in place of the draft head.
            adapt: replaces functions of the round (`speculative.Speculative`); the result is then not called exact.
            on_tokens: called with every sequence's new ids about ten times a second, or once a round if that is slower.
            on_round: called with the measurements of every round.

        Warns:
            BudgetWarning: the budget is so tight that quality is likely to suffer.

        Raises:
            RequestError: an argument has a wrong type; a prompt is empty, holds an unknown id or fills the context; a
                number is out of range; a tree, a budget or a round's measurements are asked for where nothing is
                drafted; or the call is inside a transformation of JAX.
            CheckpointError: logits are not finite, because weights are not, or are too large for their dtype.
        """
        settings = (max_new_tokens, temperature, top_k, top_p, seed)
        check_not_traced("generate", prompts, settings, self.speculative_params)
        check_types(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            max_length=max_length, tree=tree, budget=budget, simulate_accept_length=simulate_accept_length,
            adapt=adapt, on_tokens=on_tokens, on_round=on_round,
        )  # fmt: skip
        try:
            sampling = SamplingConfig(temperature, top_k, top_p)
            budget = budget if budget is None or isinstance(budget, BudgetConfig) else BudgetConfig(budget)
        except ValueError as error:
            raise RequestError(str(error)) from None
        if not 0 <= seed < 2**32:
            raise RequestError(f"expected a seed from 0 to {2**32 - 1}, got {seed}")
        ids = self._token_ids(prompts)
        limit = sequence_limits(self.config, ids, max_new_tokens, max_length)
        batch = Batch(ids, limit, () if ignore_eos else self.stop_ids, seed)
        spec = self.resolve(DecodingSpec(tree, budget, simulate_accept_length, drafter, adapt))
        if spec.tree is None and on_round is not None:
            raise RequestError(NOTHING_DRAFTED)
        if spec.tree == "auto":
            trees = [dataclasses.replace(spec, tree=tree) for tree in menu_trees(self.draft, spec)]
            menu = Menu(tuple(self.speculative(tree, sampling) for tree in trees))
            params, identity = self.speculative_params, self._costs_identity(spec, len(ids))
            run = Run(self.programs, menu, params, batch)
            chooser = Chooser(menu, params, run, self.programs, identity, self.round_costs)
            run.execute(on_tokens, on_round, chooser.prepare)
            result = self._result(run, batch, sampling, spec, max_new_tokens)
            return dataclasses.replace(result, choice=chooser.report())
        if spec.tree is None:
            run = Run(self.programs, self.autoregressive(sampling), self.params, batch)
        else:
            run = Run(self.programs, self.speculative(spec, sampling), self.speculative_params, batch)
        run.execute(on_tokens, on_round)
        return self._result(run, batch, sampling, spec, max_new_tokens)

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

    def autoregressive(self, sampling: SamplingConfig) -> Autoregressive:
        """Plain decoding."""
        return Autoregressive(self.config, sampling, self.backend)

    def speculative(self, spec: DecodingSpec, sampling: SamplingConfig) -> Speculative[Any, Any]:
        """Speculative decoding by a resolved spec; its drafter has parameters and a state of its own kind."""
        assert isinstance(spec.tree, TreeConfig)
        drafter = spec.drafter
        if drafter is None:
            assert self.draft is not None
            drafter = Eagle3Drafter(self.draft.config, self.backend)
        accept = accept_rule(sampling, spec.tree.longest_path, spec.simulate_accept_length)
        method = Speculative(self.autoregressive(sampling), drafter, spec.tree, accept, spec.budget)
        return method if spec.adapt is None else spec.adapt(method)

    @property
    def speculative_params(self) -> SpeculativeParams[Any]:
        """Parameters of speculative decoding: the target's, and the head's if there is one."""
        return SpeculativeParams(self.params, () if self.draft is None else self.draft.head)

    def _token_ids(self, prompts: str | Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        return [self.encode(p) if isinstance(p, str) else p for p in listed_prompts(prompts)]

    def _costs_identity(self, spec: DecodingSpec, batch: int) -> dict[str, Any]:
        """List what the costs of rounds depend on."""
        return {
            "model": str(self.directory.resolve()), "config": repr(self.config),
            "draft_model": self._drafter_name(spec), "precision": self.precision, "backend": self.expert_form,
            "batch": batch,
            "shapes": [tree.name for tree in menu_trees(self.draft, spec)],
            "budget": None if spec.budget is None else spec.budget.as_dict(),
            "mesh": None if self.programs.mesh is None else dict(self.programs.mesh.shape),
            "device": device_name(), "cores": os.cpu_count(), "versions": versions(),
        }  # fmt: skip

    def _result(
        self, run: Run[Any, Any, Any], batch: Batch, sampling: SamplingConfig, spec: DecodingSpec, max_new_tokens: int
    ) -> RunResult:
        prompts = [self._prompt_result(run, batch, number, max_new_tokens) for number in range(len(batch.prompts))]
        mean = {name: total / max(run.rounds, 1) for name, total in run.sums.items()}
        later = sum(p.new_tokens - 1 for p in prompts)  # the first token of each comes with prefill
        exact, simulated = self.is_exact(spec, len(prompts)), spec.simulate_accept_length
        return RunResult(
            prompts=prompts,
            experts_wanted=mean.get("experts_wanted", 0.0),
            experts_read=mean.get("experts_read", mean.get("experts_wanted", 0.0)),
            experts_max_per_device=mean.get("experts_max_per_device", 0.0),
            mass_kept=1.0 if spec.budget is None else mean.get("mass_kept", 0.0),
            tokens_replaced=mean.get("replaced", 0.0),
            exact=exact,
            exactness=exactness(exact, spec.tree, spec.budget, simulated, str(self.dtype)),
            greedy=sampling.greedy,
            budget=None if spec.budget is None else spec.budget.as_dict(),
            tree=dataclasses.asdict(spec.tree) if isinstance(spec.tree, TreeConfig) else None,
            draft_model=self._drafter_name(spec),
            simulated_accept_length=simulated,
            compile_s=run.compile_s,
            prefill_s=run.prefill_s,
            decode_s=run.decode_s,
            tokens_per_s=later / run.decode_s if run.decode_s else 0.0,
            mesh=None if self.programs.mesh is None else dict(self.programs.mesh.shape),
            device=device_name(),
            dtype=str(self.dtype),
            quantization=self.quantization,
            backend=self.expert_form,
            versions=versions(),
        )

    def _prompt_result(self, run: Run[Any, Any, Any], batch: Batch, number: int, max_new_tokens: int) -> PromptResult:
        prompt = batch.prompts[number]
        new = run.sequences[number][len(prompt) :]
        reason = "stop" if new[-1] in batch.stop_ids else "length" if len(new) == max_new_tokens else "context"
        rounds = int(run.active[number])
        by_depth = (run.accepted[number] / max(rounds, 1)).tolist()
        return PromptResult(
            text=self.decode(new, after=prompt),
            token_ids=new,
            prompt_tokens=len(prompt),
            new_tokens=len(new),
            rounds=rounds,
            accept_length=1.0 + sum(by_depth) if rounds else 0.0,
            accepted_by_depth=by_depth,
            finish_reason=reason,
        )

    def _drafter_name(self, spec: DecodingSpec) -> str | None:
        if spec.tree is None:
            return None
        if spec.drafter is not None:
            return type(spec.drafter).__name__
        return None if self.draft is None else self.draft.name
