"""Drafters of a model: a loaded head, or a drafter that has a name in place of files."""

from collections.abc import Callable
from typing import Any, NamedTuple

from moespec_jax.checkpoint.head.read import LoadedBlockDraft, LoadedDraft
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.dflash_drafter import DFlashDrafter
from moespec_jax.decoding.drafter import Drafter
from moespec_jax.decoding.eagle3_drafter import Eagle3Drafter
from moespec_jax.decoding.ngram_drafter import NgramDrafter
from moespec_jax.decoding.self_drafter import SelfDrafter
from moespec_jax.decoding.tree import check_draft_vocabulary
from moespec_jax.errors import RequestError
from moespec_jax.nn.backend import Backend

# The tree where none is given. On CPU it is the fastest that was measured with the embedded pair; elsewhere it is what
# published heads for MoE targets are served with.
DEFAULT_TREE = TreeConfig(depth=2, top_k=1, size=4)
# Trees that `tree="auto"` chooses from, beside plain decoding: a short and a longer chain, a small and a large tree.
MENU = (TreeConfig(1, 1, 3), TreeConfig(3, 1, 5), TreeConfig(4, 4, 16), TreeConfig(7, 10, 60))
# The same of n-grams, whose drafts cost the same at any depth: a long match is drafted as a chain, a short one as a
# wider tree.
NGRAM_TREE = TreeConfig(depth=6, top_k=4, size=8)
NGRAM_MENU = (TreeConfig(2, 2, 4), NGRAM_TREE, TreeConfig(14, 4, 16))
# The same of a target that drafts itself, whose every level is a pass of its own.
SELF_MENU = (TreeConfig(0, 1, 2), TreeConfig(1, 1, 3), TreeConfig(3, 1, 5))


class NamedDraft(NamedTuple):
    """A drafter by name, in place of a loaded head.

    Fields:
        name: as `--draft-model` takes it.
        drafter: makes it for a target's settings and back-end.
        default_tree: the tree where none is given.
        menu: trees that `tree="auto"` chooses from.
        head: its parameters: none.
        notes: lines to show the user: none.
    """

    name: str
    drafter: Callable[[DecoderConfig, Backend], Drafter[Any, Any]]
    default_tree: TreeConfig = DEFAULT_TREE
    menu: tuple[TreeConfig, ...] = MENU
    head: tuple[()] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"NamedDraft({self.name})"


# What a model drafts with.
Draft = LoadedDraft | LoadedBlockDraft | NamedDraft


def named_draft(name: str, config: DecoderConfig) -> NamedDraft | None:
    """Find the drafter of a name, `NAME` or `NAME:ARGUMENT`; None where the name is that of a head.

    Raises:
        RequestError: the argument does not fit the drafter or the target of these settings.
    """
    kind, colon, argument = name.partition(":")
    if kind not in _NAMED or "/" in argument or "\\" in argument:
        return None
    return _NAMED[kind](argument if colon else None, config)


def drafter_of(draft: Draft, config: DecoderConfig, backend: Backend) -> Drafter[Any, Any]:
    """Make the drafter of a loaded head or of a name, for a target of these settings."""
    if isinstance(draft, NamedDraft):
        return draft.drafter(config, backend)
    if isinstance(draft, LoadedBlockDraft):
        return DFlashDrafter(draft.config, backend)
    return Eagle3Drafter(draft.config, backend)


def described(name: str | None) -> str:
    """Describe what drafts by its name in results: `draft head X`, `drafter ngram`, `no draft head`."""
    if name is None:
        return "no draft head"
    return f"drafter {name}" if name.partition(":")[0] in _NAMED else f"draft head {name}"


def default_tree(draft: Draft | None) -> TreeConfig:
    """Choose the tree where none is given; None stands for a drafter of the user's own."""
    if isinstance(draft, LoadedBlockDraft):
        return draft.config.whole_block
    return draft.default_tree if isinstance(draft, NamedDraft) else DEFAULT_TREE


def menu_of(draft: Draft | None) -> tuple[TreeConfig, ...]:
    """List the trees that `tree="auto"` chooses from; None stands for a drafter of the user's own."""
    if isinstance(draft, LoadedBlockDraft):
        return draft.config.chains
    if isinstance(draft, LoadedDraft):
        return tuple(tree for tree in MENU if tree.top_k <= draft.config.draft_vocab_size)
    return MENU if draft is None else draft.menu


def check_drafted(draft: Draft | None, tree: TreeConfig) -> None:
    """Check that a tree can be drafted; None stands for a drafter of the user's own, which is not asked.

    Raises:
        RequestError: it cannot.
    """
    try:
        if isinstance(draft, LoadedBlockDraft):
            draft.config.check_chain(tree)
        if isinstance(draft, LoadedDraft):
            check_draft_vocabulary(tree, draft.config.draft_vocab_size)
    except ValueError as error:
        raise RequestError(str(error)) from None


def _ngram(argument: str | None, config: DecoderConfig) -> NamedDraft:
    if argument is not None:
        raise RequestError(f"expected the drafter ngram without an argument; got ngram:{argument}")
    return NamedDraft("ngram", lambda config, backend: NgramDrafter(), NGRAM_TREE, NGRAM_MENU)


def _self(argument: str | None, config: DecoderConfig) -> NamedDraft:
    if not config.num_sparse_layers:
        raise RequestError("expected a target with experts, to draft itself with fewer of them; this one has none")
    most, text = config.num_experts_per_tok, "1" if argument is None else argument
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
        raise RequestError(
            f"expected self:K with 1 to {most} experts a token, as many as the target's; got self:{text}"
        )
    experts = int(text)
    return NamedDraft(f"self:{experts}", lambda config, backend: SelfDrafter(config, backend, experts), menu=SELF_MENU)


_NAMED: dict[str, Callable[[str | None, DecoderConfig], NamedDraft]] = {"ngram": _ngram, "self": _self}
# How help texts and errors list the names.
NAMES = "ngram, self:K"
