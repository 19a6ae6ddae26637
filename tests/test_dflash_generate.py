"""The commands with a DFlash head from disk: it is recognised, drafts the chain of its block, and leaves the text as it
is; and the probe finds which states it reads."""

import dataclasses
from pathlib import Path

import dflash_oracle as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from dflash_files import speculators_fields, write_block_head, zlab_fields
from tiny import write_tiny
from tiny_pair import run_json

from convert import probe_draft
from moespec_jax.checkpoint.head.read import LoadedBlockDraft
from moespec_jax.checkpoint.read import load_config
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.dflash_drafter import DFlashDrafter
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.generate import main
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.runtime.load import load
from moespec_jax.study.__main__ import studied_tree


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of a tiny target of four layers and of a DSpark head for it."""
    directory = tmp_path_factory.mktemp("pair")
    target = write_tiny(directory / "target", num_hidden_layers=4)
    config = oracle.config_for(load_config(target), boundaries=(1, 2, 3), **oracle.VARIANTS["vanilla"])
    config = dataclasses.replace(config, draft_vocab_size=300)
    head = write_block_head(directory / "head", speculators_fields(config), config, oracle.head_of(config))
    return target, head


def test_a_head_is_recognised_and_drafts_its_block(pair: tuple[Path, Path]) -> None:
    target, head = pair
    model = load(target, head)
    assert isinstance(model.draft, LoadedBlockDraft) and model.draft.format == "speculators"
    spec = model.resolve(DecodingSpec("default"))
    assert spec.tree == TreeConfig(4, 1, 6)
    drafter = model.speculative(spec, SamplingConfig()).drafter
    assert drafter == DFlashDrafter(model.draft.config, model.backend)
    moved = load(target, head, draft_boundaries=(0, 2, 4)).draft
    assert isinstance(moved, LoadedBlockDraft) and moved.config.boundaries == (0, 2, 4)


@pytest.mark.usefixtures("fast_compile")
def test_generate_prints_plain_decoding_s_text(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(pair[0]), "--max-new-tokens", "24", "--ignore-eos", "--prompt-ids", "5,6,7"]
    plain = run_json(capsys, *flags)
    drafted = run_json(capsys, *flags, "--draft-model", str(pair[1]))
    assert drafted["prompts"][0]["token_ids"] == plain["prompts"][0]["token_ids"] and drafted["exact"]
    assert drafted["tree"] == {"depth": 4, "top_k": 1, "size": 6} and drafted["draft_model"] == str(pair[1])


@pytest.mark.parametrize(
    "shape",
    [
        ["--tree-depth", "5", "--tree-top-k", "1", "--tree-size", "7"],
        ["--tree-depth", "1", "--tree-top-k", "2", "--tree-size", "4"],
    ],
)
def test_trees_that_a_block_does_not_draft_are_refused(
    shape: list[str], pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", str(pair[0]), "--draft-model", str(pair[1]), "--prompt-ids", "5,6", *shape]
    assert main(command) == 2
    *_, error = capsys.readouterr().err.splitlines()  # after the origin of the boundaries
    assert error.startswith("error: expected a chain (top-k 1) of at most 6 tokens")


def test_a_study_without_a_tree_drafts_the_whole_block(pair: tuple[Path, Path]) -> None:
    """Every other drafter drafts EAGLE's tree there."""
    assert studied_tree(load(*pair).draft) == TreeConfig(4, 1, 6)
    assert studied_tree(load(pair[0], "ngram").draft) == TreeConfig(7, 10, 60)


def test_the_probe_finds_the_states_that_a_head_reads(tmp_path: Path) -> None:
    """A head that drafts what the target's last layer leaves at the token before the newest: right where all tokens are
    the same. Its files say one boundary too low."""
    target = write_tiny(tmp_path / "target", num_hidden_layers=3)
    model = load(target, backend=BACKENDS["dense"])
    assert model.params.lm_head is not None
    config, width = model.config, model.config.hidden_size
    own = dataclasses.replace(
        oracle.BASE, vocab_size=config.vocab_size, draft_vocab_size=config.vocab_size, boundaries=(2,),
        mask_token_id=3, num_attention_heads=4, num_key_value_heads=4, hidden_size=width, sliding_windows=(1,),
        causal=(True,), sample_from_anchor=True,
    )  # fmt: skip
    head = oracle.head_of(own)
    layer = head.layers[0]
    # Of the one context row that is in the window and the row itself, alike in all heads; the row itself is faint.
    mixed = dataclasses.replace(
        layer.attention, q_norm=jnp.zeros(own.head_dim), v=jnp.eye(width), o=50.0 * jnp.eye(width)
    )
    faint = 1e-3 * jnp.ones(width)
    silent = dataclasses.replace(layer.mlp, down=jnp.zeros((own.intermediate_size, width)))
    layer = dataclasses.replace(layer, input_norm=faint, attention=mixed, mlp=silent)
    head = dataclasses.replace(
        head, fc=jnp.eye(width), hidden_norm=model.params.norm, norm=jnp.ones(width), layers=(layer,),
        lm_head=model.params.lm_head,
    )  # fmt: skip
    directory = write_block_head(tmp_path / "head", speculators_fields(own, sample_from_anchor=True), own, head)
    loaded = load(target, directory, backend=BACKENDS["dense"])
    assert isinstance(loaded.draft, LoadedBlockDraft)
    rows = np.repeat(np.random.default_rng(0).permutation(300)[:4], 40).reshape(4, 40).astype(np.int32)
    findings = {found.shift: found.accuracy for found in probe_draft.probe(loaded, loaded.draft, rows)}
    assert findings.keys() == {-1, 0, 1} and findings[1] > findings[0] + 0.3 and findings[1] > findings[-1] + 0.3


def test_z_lab_s_files_are_one_boundary_higher(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The same ids in a file of z-lab and in one of speculators."""
    config = oracle.config_for(load_config(pair[0]), boundaries=(1, 2, 3), draft_vocab_size=320)
    head, ids = oracle.head_of(config), {"mask_token_id": 3, "target_layer_ids": [1, 2, 3]}
    zlab = write_block_head(tmp_path / "a", zlab_fields(config, dflash_config=ids), config, head)
    speculators = write_block_head(tmp_path / "b", speculators_fields(config), config, head)
    one, other = (load(pair[0], directory).draft for directory in (zlab, speculators))
    assert isinstance(one, LoadedBlockDraft) and isinstance(other, LoadedBlockDraft)
    assert one.config.boundaries == (2, 3, 4) and other.config.boundaries == (1, 2, 3)
