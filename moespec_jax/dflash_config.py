"""Settings of block drafters: DFlash and DSpark heads. Frozen and hashable, as all settings are (`config.py`)."""

import dataclasses
from typing import Literal

from moespec_jax.config import QkNorm, RopeConfig, TreeConfig

Markov = Literal["none", "vanilla", "gated", "rnn"]
Confidence = Literal["none", "hidden", "hidden and markov"]


@dataclasses.dataclass(frozen=True)
class DFlashConfig:
    """Settings of a DFlash head: a few Qwen3-style layers that draft a block of tokens in one pass, from the newest
    token, mask tokens behind it, and the target's hidden states of all tokens before it. A DSpark head is one with a
    Markov or a confidence part. Fields not listed are as in `config.json`.

    Fields:
        vocab_size: size of the target's vocabulary.
        draft_vocab_size: size of the draft vocabulary, a subset of the target's.
        target_hidden_size: width of each auxiliary hidden state.
        boundaries: boundaries of the target whose hidden states the head reads, ascending.
        block_size: rows of a pass: the newest token and the mask tokens behind it.
        mask_token_id: id of the mask token, whose embedding stands for a token not yet known.
        sliding_windows: for each layer, how many tokens back its rows attend; 0 for all.
        causal: for each layer, whether a row of the block attends only to itself and the rows before it.
        anchored_windows: whether windows are counted from the newest token for all rows of a block (speculators), and
            end at the context; otherwise from each row (z-lab).
        sample_from_anchor: whether the newest token's row drafts too, so that row j drafts the token after its own;
            otherwise row j drafts its own token.
        markov: form of the bias that the token drafted last gives to the next one's logits.
        markov_rank: rank of that bias.
        confidence: input of the estimate that a drafted token is accepted where all before it were.
        own_embedding: whether the head has an embedding of its own in place of the target's.
    """

    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    boundaries: tuple[int, ...]
    block_size: int
    mask_token_id: int
    sliding_windows: tuple[int, ...]
    causal: tuple[bool, ...]
    anchored_windows: bool = True
    sample_from_anchor: bool = False
    markov: Markov = "none"
    markov_rank: int = 0
    confidence: Confidence = "none"
    max_position_embeddings: int = 2048
    rope: RopeConfig = RopeConfig()
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    own_embedding: bool = False

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return len(self.sliding_windows)

    @property
    def qk_norm(self) -> QkNorm:
        """Queries and keys are normed per head."""
        return "head"

    @property
    def clip_qkv(self) -> None:
        """None: no draft head clips queries, keys or values."""
        return None

    @property
    def aux_size(self) -> int:
        """Width of the concatenated auxiliary hidden states."""
        return len(self.boundaries) * self.target_hidden_size

    @property
    def drafted(self) -> int:
        """Number of tokens that a pass drafts."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    @property
    def whole_block(self) -> TreeConfig:
        """The chain of all tokens that a pass drafts."""
        return TreeConfig(depth=self.drafted - 1, top_k=1, size=self.drafted + 1)

    @property
    def chains(self) -> tuple[TreeConfig, ...]:
        """Chains that are worth a choice: of two tokens, of half of the block, and of the whole."""
        counts = sorted({min(2, self.drafted), -(-self.drafted // 2), self.drafted})
        return tuple(TreeConfig(depth=count - 1, top_k=1, size=count + 1) for count in counts)

    def check_chain(self, tree: TreeConfig) -> None:
        """Check that a pass drafts this tree.

        Raises:
            ValueError: it is no chain, or is longer than the block that the head was trained on.
        """
        if tree.top_k > 1 or tree.longest_path > self.drafted + 1:
            raise ValueError(
                f"expected a chain (top-k 1) of at most {self.drafted + 1} tokens, the root included, which is what"
                f" this head's block of {self.block_size} drafts; got size {tree.size}, depth {tree.depth}, top-k"
                f" {tree.top_k}"
            )
