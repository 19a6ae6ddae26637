"""A loaded model, ready to generate: what `moespec_jax.load` returns.

import moespec_jax
model = moespec_jax.load()                      # the embedded model; or a directory, or a hub id
print(model.generate("def fibonacci(n):").prompts[0].text)
"""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from moespec_jax.checkpoint.head.read import LoadedDraft
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import Settings
from moespec_jax.decoding.budget import check_names
from moespec_jax.decoding.budget_config import BudgetConfig, BudgetWarning, caution, is_exact, resolve
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Adapt, SpeculationSettings, Speculator
from moespec_jax.decoding.tree import check_draft_vocabulary
from moespec_jax.errors import RequestError
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.quantization import Quantization
from moespec_jax.runtime.method import Method, plain_method, speculative_method
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.results import PromptResult, RunResult, versions
from moespec_jax.runtime.run import Batch, OnRound, OnTokens, Run

# What is drafted where nothing else is asked for. On CPU it measured fastest with the embedded pair (README); elsewhere
# it is what published heads for MoE targets are served with, until a measurement says better.
DEFAULT_TREE = TreeConfig(depth=2, top_k=1, size=4)
AskedTree = TreeConfig | Literal["default"] | None


@dataclasses.dataclass
class Model:
    """A decoder with its tokenizer, stop ids and compiled programs, and its draft head if it has one."""

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

    def __post_init__(self) -> None:
        # One function object for the life of the model: compiled programs are found by it.
        self._compute = self.backend.compute(self.config.hidden_act)

    @property
    def precision(self) -> str:
        """What weights are kept in, in words."""
        return str(self.dtype) if self.quantization is None else f"{self.dtype}, {self.quantization} experts"

    def encode(self, prompt: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text prompt, with the special tokens the tokenizer adds unless told otherwise."""
        if self.tokenizer is None:
            raise RequestError(f"expected token ids (--prompt-ids): {self.directory} has no tokenizer")
        # How Python spells bytes of a command line that are not UTF-8.
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise RequestError(f"expected a prompt of valid UTF-8 text, got {prompt[:40]!r}")
        return self.tokenizer.encode(prompt, add_special_tokens=special_tokens).ids

    def decode(self, token_ids: Sequence[int], after: Sequence[int] = ()) -> str | None:
        """Text of token ids without special tokens; None without a tokenizer.

        `after` are the ids before them in the sequence: some tokenizers drop a leading space of what they see first.
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
        tree: AskedTree = "default",
        budget: BudgetConfig | int | float | None = None,
        simulate_accept_length: float | None = None,
        adapt: Adapt | None = None,
        on_tokens: OnTokens | None = None,
        on_round: OnRound | None = None,
    ) -> RunResult:
        """Continue one or several prompts, given as text or as token ids, as one batch.

        With a draft head, `tree` says what is drafted in a round; None decodes plainly. A `budget` limits how many
        experts a layer reads to verify it, which changes what comes out (a bare number: under the default rule).
        `simulate_accept_length` makes rounds accept that many tokens on average, whatever the model says: for timing.
        `adapt` puts other functions in place of a round's own; of what comes out then, `exact` claims nothing.
        `on_tokens` is called with every sequence's new ids, about ten times a second or once a round if that is slower;
        `on_round` with what each round did.

        Warns:
            BudgetWarning: the budget is so tight that the output suffers.

        Raises:
            RequestError: a prompt is empty, holds an unknown id or fills the context, or a number is out of range; or
                something is asked of a draft head that is not there.
            CheckpointError: logits are not finite, because weights are not, or are too large for their dtype.
        """
        try:
            sampling = SamplingConfig(temperature, top_k, top_p)
        except ValueError as error:
            raise RequestError(str(error)) from None
        if not 0 <= seed < 2**32:
            raise RequestError(f"expected a seed from 0 to {2**32 - 1}, got {seed}")
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        if any(isinstance(p, int) for p in given):
            raise RequestError("expected a list of prompts; for one prompt of token ids, wrap it: [[5, 17, 9]]")
        ids = [self.encode(p) if isinstance(p, str) else list(p) for p in given]
        limit = self._limits(ids, max_new_tokens, max_length)
        batch = Batch(ids, limit, () if ignore_eos else self.stop_ids, seed)
        shape = self._tree(tree, simulate_accept_length, adapt, on_round)
        rule = self._budget(budget, shape)
        run = Run(self.programs, self.method(sampling, shape, rule, simulate_accept_length, adapt), batch)
        run.execute(on_tokens, on_round)
        own = simulate_accept_length is None and adapt is None
        exact = own and (rule is None or is_exact(rule, self.config, len(ids)))
        return self._result(run, batch, sampling, max_new_tokens, shape, rule, simulate_accept_length, exact)

    def _tree(self, tree: AskedTree, simulate: float | None, *hooks: object) -> TreeConfig | None:
        """The tree to draft, None for plain decoding, which has nothing to simulate and no place for `hooks`."""
        if tree == "default":
            tree = None if self.draft is None else DEFAULT_TREE
        if tree is None:
            if any(asked is not None for asked in (simulate, *hooks)):
                raise RequestError("expected speculative decoding to trace, simulate or adapt; this is plain decoding")
            return None
        if self.draft is None:
            raise RequestError(f"expected a draft head to draft a tree with; {self.directory} was loaded without one")
        try:
            check_draft_vocabulary(tree, self.draft.config.draft_vocab_size)
        except ValueError as error:
            raise RequestError(str(error)) from None
        if simulate is not None and not 1.0 <= simulate <= tree.longest_path:
            raise RequestError(
                f"expected an accept length from 1 to {tree.longest_path}, the longest path of the tree; got {simulate}"
            )
        return tree

    def _budget(self, budget: BudgetConfig | int | float | None, tree: TreeConfig | None) -> BudgetConfig | None:
        """The rule with a number for each layer."""
        if budget is None:
            return None
        if tree is None:
            raise RequestError("expected speculative decoding to budget the verification of; this is plain decoding")
        try:
            rule = budget if isinstance(budget, BudgetConfig) else BudgetConfig(budget)
            check_names(rule)
            rule = resolve(rule, self.config)
        except ValueError as error:
            raise RequestError(str(error)) from None
        if warning := caution(rule, self.config):
            warnings.warn(warning, BudgetWarning, stacklevel=3)
        return rule

    def method(
        self,
        sampling: SamplingConfig,
        tree: TreeConfig | None = None,
        budget: BudgetConfig | None = None,
        simulate: float | None = None,
        adapt: Adapt | None = None,
    ) -> Method:
        """The programs that decode: plainly, or drafting `tree` and verifying it under a resolved `budget`, with what
        `adapt` makes of that."""
        settings = Settings(self.config, sampling, self._compute, self.backend.attention)
        if tree is None or self.draft is None:
            return plain_method(settings, self.params, self.dtype)
        accept = accept_rule(sampling, tree.longest_path, simulate)
        speculation = SpeculationSettings(settings, self.draft.config, tree, accept, budget)
        speculation = speculation if adapt is None else adapt(speculation)
        return speculative_method(speculation, Speculator(self.params, self.draft.head), self.dtype)

    def _limits(self, ids: list[list[int]], max_new_tokens: int, max_length: int | None) -> list[int]:
        """The length at which each sequence ends at the latest."""
        context = self.config.context_length
        if not ids:
            raise RequestError("expected at least one prompt")
        if max_new_tokens < 1:
            raise RequestError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
        if max_length is not None and not 1 < max_length <= context:
            raise RequestError(f"expected max_length from 2 to the model's context of {context}, got {max_length}")
        context = max_length or context
        for number, prompt in enumerate(ids):
            if not prompt:
                raise RequestError(f"expected a prompt of at least one token; prompt {number} is empty")
            if len(prompt) >= context:
                raise RequestError(
                    f"expected a prompt shorter than the context of {context} tokens; prompt {number} has {len(prompt)}"
                )
            for i in prompt:
                if not 0 <= i < self.config.vocab_size:
                    raise RequestError(
                        f"expected token ids from 0 to {self.config.vocab_size - 1}; prompt {number} holds {i}"
                    )
        return [min(len(prompt) + max_new_tokens, context) for prompt in ids]

    def _result(
        self,
        run: Run,
        batch: Batch,
        sampling: SamplingConfig,
        max_new_tokens: int,
        tree: TreeConfig | None,
        budget: BudgetConfig | None,
        simulate: float | None,
        exact: bool,
    ) -> RunResult:
        pairs = zip(batch.prompts, run.sequences, strict=True)
        new = [sequence[len(prompt) :] for prompt, sequence in pairs]
        prompts = [self._prompt_result(run, batch, number, ids, max_new_tokens) for number, ids in enumerate(new)]
        later = sum(p.new_tokens - 1 for p in prompts)
        mean = {name: total / max(run.rounds, 1) for name, total in run.sums.items()}
        return RunResult(
            prompts=prompts,
            experts_wanted=mean["experts_wanted"],
            experts_loaded=mean["experts_wanted"] if tree is None else mean["experts_read"],
            mass_kept=1.0 if budget is None else mean["mass_kept"],
            tokens_replaced=mean["replaced"],
            exact=exact,
            greedy=sampling.greedy,
            budget=None if budget is None else dataclasses.asdict(budget),
            tree=None if tree is None else dataclasses.asdict(tree),
            draft_model=None if tree is None or self.draft is None else self.draft.name,
            simulated_accept_length=simulate,
            compile_s=run.compile_s,
            prefill_s=run.prefill_s,
            decode_s=run.decode_s,
            tokens_per_s=later / run.decode_s if run.decode_s else 0.0,
            experts_slowest=mean["experts_slowest"],
            mesh=None if self.programs.mesh is None else dict(self.programs.mesh.shape),
            device=f"{jax.devices()[0].platform} ({jax.devices()[0].device_kind})",
            dtype=str(self.dtype),
            quantization=self.quantization,
            versions=versions(),
        )

    def _prompt_result(self, run: Run, batch: Batch, number: int, new: list[int], max_new_tokens: int) -> PromptResult:
        prompt = batch.prompts[number]
        reason = "stop" if new[-1] in batch.stop_ids else "length" if len(new) == max_new_tokens else "context"
        rounds = int(run.active[number])
        by_depth = (run.accepted[number] / max(rounds, 1)).tolist()
        accept_length = 1.0 + sum(by_depth) if rounds else 0.0
        text = self.decode(new, after=prompt)
        return PromptResult(text, new, len(prompt), len(new), rounds, accept_length, by_depth, reason)
