"""A second way of loading the target: how far its distributions are from those of the first along the same texts.

Both read every text in plain passes, chunk by chunk. Of the first only the hidden states and the output head are kept,
so that one set of weights is in memory at a time. Each set of texts is a task of the ledger for each second way.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from moespec_jax.checkpoint.hub import locate
from moespec_jax.checkpoint.read import load_config
from moespec_jax.cli.arguments import DTYPES, load_requested, short_name
from moespec_jax.decoding.autoregressive import TargetPrefill
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.state_specs import BY_SEQUENCE
from moespec_jax.decoding.states import PrefillState
from moespec_jax.errors import RequestError
from moespec_jax.evaluate.divergence import distribution_columns
from moespec_jax.evaluate.rows import lost_columns, of_set
from moespec_jax.evaluate.texts import TextSet
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.text_chunks import TextChunks, hidden_states, in_blocks, read_chunk
from moespec_jax.nn.decoder import Decoder, unembed
from moespec_jax.nn.quantization import QUANTIZATIONS
from moespec_jax.parallel.processes import fetch
from moespec_jax.runtime.model import Model


@dataclasses.dataclass(frozen=True)
class SecondLoading:
    """A second way of loading.

    Fields:
        what: a quantization, a dtype, or a directory or hub id, as it is given.
    """

    what: str

    @property
    def name(self) -> str:
        """Name in rows of results."""
        return f"plain, {self.what if self.is_form else short_name(self.what)}"

    @property
    def is_form(self) -> bool:
        """True for another form of the same weights, false for another checkpoint."""
        return self.what in (*QUANTIZATIONS, *DTYPES)

    def flags(self, arguments: argparse.Namespace) -> argparse.Namespace:
        """Flags of the model by which it is loaded: those of the first, but for what it names."""
        changes: dict[str, Any] = {"draft_model": "none", "draft_revision": None, "draft_boundaries": None}
        if self.what in QUANTIZATIONS:
            changes["quantization"] = self.what
        elif self.what in DTYPES:
            changes["dtype"] = self.what
        else:
            changes |= {"model": self.what, "revision": None, "quantization": None}
        return argparse.Namespace(**vars(arguments) | changes)


def add_second_flag(group: argparse._ArgumentGroup) -> None:
    """Add `--also-load`."""
    group.add_argument(
        "--also-load", action="append", default=[], metavar="WHAT",
        help="load the target a second way afterwards, and compare its distributions with the first's along the texts:"
        f" {', '.join(QUANTIZATIONS)} (routed experts), {', '.join(DTYPES)} (dtype), or the directory or hub id of"
        " another checkpoint of the model, such as a quantized one; lossy; repeatable",
    )  # fmt: skip


def second_loadings(arguments: argparse.Namespace) -> list[SecondLoading]:
    """Read `--also-load`.

    Raises:
        RequestError: two of them have one name, or one is how the first is loaded.
    """
    found = [SecondLoading(what) for what in arguments.also_load]
    names = [second.name for second in found]
    if len(set(names)) < len(names):
        raise RequestError(f"expected --also-load of different names; got {', '.join(arguments.also_load)}")
    for second in found:
        whole = arguments.model if arguments.quantization is None else None  # the same checkpoint, not quantized
        if second.what in (arguments.quantization, arguments.dtype, whole):
            raise RequestError(f"expected --also-load of another way than the first; both are {second.what}")
    return found


def check_checkpoints(
    model: Model, arguments: argparse.Namespace, seconds: Sequence[SecondLoading], longest: int
) -> None:
    """Check the settings of other checkpoints, before anything is measured.

    Raises:
        CheckpointError: one cannot be found or read.
        RequestError: one has another vocabulary, or a context that is shorter than the longest text.
    """
    for second in seconds:
        if second.is_form:
            if second.what == str(model.dtype):
                raise RequestError(f"expected --also-load of another way than the first; both are {second.what}")
            continue
        config = load_config(locate(second.what, None, arguments.offline, False))
        if config.vocab_size != model.config.vocab_size:
            raise RequestError(
                f"expected {second.what} to have the vocabulary of the first model, {model.config.vocab_size} tokens;"
                f" it has {config.vocab_size}"
            )
        if config.context_length < longest:
            raise RequestError(
                f"expected {second.what} to have a context of the longest text, {longest} tokens; it has"
                f" {config.context_length}"
            )


def compare(
    model: Model,
    arguments: argparse.Namespace,
    seconds: Sequence[SecondLoading],
    sets: Sequence[TextSet],
    ledger: Ledger,
) -> None:
    """Compare every second way with `model`, whose weights are dropped but for the output head; the ledger receives
    sums by text."""
    missing = {second: [t for t in sets if task_name(t, second) not in ledger] for second in seconds}
    if not any(missing.values()):
        return
    needed = [texts for texts in sets if any(texts in kept for kept in missing.values())]
    batch, prefill = arguments.batch, model.autoregressive(SamplingConfig()).prefill
    read = partial(hidden_states, model.programs, prefill, model.params)
    hidden = {id(texts): [list(read(part.texts)) for part in _parts(texts, batch)] for texts in needed}
    first = model.params.replace(layers=(), experts=None)  # pyright: ignore[reportAttributeAccessIssue]
    model.params, model.draft = first, None
    with tqdm(total=sum(map(len, missing.values())), desc="second loadings", unit="set") as bar:
        for second, kept in missing.items():
            if not kept:
                continue
            loaded = load_requested(second.flags(arguments))
            for texts in kept:
                pairs = zip(_parts(texts, batch), hidden[id(texts)], strict=True)
                parts = [_sums(loaded, first, part, states) for part, states in pairs]
                sums = {name: [value for part in parts for value in part[name]] for name in parts[0]}
                ledger.put(task_name(texts, second), {"precision": loaded.precision, "sums": sums})
                bar.update()
            del loaded


def second_rows(
    model: Model, seconds: Sequence[SecondLoading], sets: Sequence[TextSet], ledger: Ledger
) -> list[dict[str, Any]]:
    """Make rows for each set: of the first way in plain passes, and of every second way."""
    rows: list[dict[str, Any]] = []
    for texts in sets:
        sizes, exact = texts.scored_bytes(model), None
        for second in seconds:
            task = ledger.get(task_name(texts, second))
            sums = {name: np.asarray(values, np.float64) for name, values in task["sums"].items()}
            if exact is None:
                same = sums | {"kl": sums["kl"] * 0, "same": sums["positions"], "nll": sums["nll_first"]}
                exact = distribution_columns(same, sizes)
                rows.append(of_set(texts) | _columns("plain", sums, exact, exact))
            found = distribution_columns(sums, sizes)
            row = _columns(second.name, sums, found, exact) | {"exact": False, "dtype": task["precision"]}
            rows.append(of_set(texts) | row | ({} if second.is_form else {"model": short_name(second.what)}))
    return rows


def task_name(texts: TextSet, second: SecondLoading) -> str:
    """Name in the ledger of a set of texts for one second way."""
    return f"{texts.name}, {texts.kind}, {second.name}"


def compare_chunk(
    prefill: TargetPrefill,
    params: Decoder,
    state: PrefillState,
    first: Decoder,
    hidden: Float[Array, "texts chunk model"],
    tokens: Int[Array, "texts chunk_and_one"],
    start: Int[Array, ""],
    lengths: Int[Array, " texts"],
) -> tuple[PrefillState, dict[str, Float[Array, "texts chunk"]]]:
    """Read a chunk, and compare the distributions of the next token with those of the output head of `first` after its
    hidden states: divergence, equal first choices, and the negative log-likelihoods of the next token by both."""
    state, own = read_chunk(prefill, params, state, tokens[:, :-1], start, lengths)

    def compared(given: Array, own: Array, following: Array) -> dict[str, Array]:
        p, q = (jax.nn.log_softmax(unembed(*pair), axis=-1) for pair in ((first, given), (params, own)))
        nll = [-jnp.take_along_axis(log_p, following[..., None], axis=-1)[..., 0] for log_p in (p, q)]
        same = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
        kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        return {"kl": kl, "same": same.astype(jnp.float32), "nll_first": nll[0], "nll": nll[1]}

    return state, in_blocks(compared, hidden, own, tokens[:, 1:])


def _sums(model: Model, first: Decoder, texts: TextSet, hidden: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Sum the comparisons of each text over the positions whose next token is scored: all from the first root on."""
    prefill, by_text = model.autoregressive(SamplingConfig()).prefill, cast(Any, BY_SEQUENCE)
    chunks = TextChunks(model.programs, texts.texts)
    state = chunks.empty(prefill, model.params)
    names, count = ("kl", "same", "nll_first", "nll"), len(texts.texts)
    specs = (prefill.specs(model.params), cast(Any, dict.fromkeys(names, by_text)))
    ends = np.array([len(text) - 1 for text in texts.texts])
    sums = {name: np.zeros(count) for name in names}
    for (span, tokens, start), before in zip(chunks, hidden, strict=True):
        given = (first, model.programs.put(before, BY_SEQUENCE), tokens, start, chunks.lengths)
        run = model.programs.run
        state, found = run(compare_chunk, prefill, model.params, state, *given, donate=True, specs=specs)
        position = np.arange(span.start, span.stop)[None, :]
        scored = (position >= np.array(texts.given)[:, None]) & (position < ends[:, None])
        for name in names:
            sums[name] += np.where(scored, fetch(found[name])[:count], 0).sum(axis=1, dtype=np.float64)
    return {name: values.tolist() for name, values in sums.items()} | {"positions": (ends - texts.given).tolist()}


def _parts(texts: TextSet, batch: int) -> Iterator[TextSet]:
    """Divide a set into batches."""
    for start in range(0, len(texts.texts), batch):
        part = slice(start, start + batch)
        yield dataclasses.replace(texts, texts=texts.texts[part], given=texts.given[part])


def _columns(name: str, sums: dict[str, Any], found: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """Columns of a row of plain passes: there are no rounds."""
    nothing = ("accept_length", "accepted_by_depth", "experts_wanted", "experts_read", "tokens_replaced")
    about = {"way": name, "exact": True, "tree": None, "budget": None, "texts": len(sums["positions"])}
    counts = {"positions": int(sums["positions"].sum()), "rounds": None}
    return about | counts | found | dict.fromkeys(nothing) | lost_columns(found, exact)
