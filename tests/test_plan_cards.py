"""Sizing of models on NVIDIA cards: what is counted without a compiler, and what is refused."""

import json
import math
from pathlib import Path

import jax
import pytest
from devices import run_processes
from jax.sharding import AbstractMesh
from tiny import CONFIG

from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.parameters import abstract_decoder
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.measure.published_shapes import MODELS, draft_config
from moespec_jax.measure.roofline import verification_bytes
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.parallel.mesh import AXES, MeshConfig
from moespec_jax.plan import card_sizing
from moespec_jax.plan.__main__ import main
from moespec_jax.plan.card_sizing import MARGIN, SHARES, share_of, size_up_cards
from moespec_jax.plan.cards import CARDS, default_names, parse_machine
from moespec_jax.plan.floors import pass_bytes
from moespec_jax.plan.program import Load, Workload, abstract_round
from moespec_jax.plan.table import cards_table

WITH_COMPILER = card_sizing.has_compiler()
TREE = TreeConfig(depth=2, top_k=2, size=4)
# Published numbers of parameters, in 10^9.
PARAMETERS = {
    "OLMoE-1B-7B": 6.92, "Qwen3-30B-A3B": 30.5, "Qwen3-235B-A22B": 235.0, "Mixtral-8x7B": 46.7, "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8, "GLM-4.5-Air": 106.9, "MiniMax-M2": 228.7,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Size up without temporaries, whether the CUDA compiler is installed or not."""
    monkeypatch.setattr(card_sizing, "has_compiler", lambda: False)
    monkeypatch.setattr("moespec_jax.plan.hardware.has_compiler", lambda: False)


def load_of(config: DecoderConfig, batch: int = 1, slots: int = 256, budget: BudgetConfig | None = None) -> Load:
    return Load(config, draft_config("tiny", config, intermediate_size=64), TREE, slots, batch, budget, None)


def tiny(**changes: object) -> DecoderConfig:
    return read_config(CONFIG | changes)


def all_bytes(tree: object) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_published_shapes_have_the_published_number_of_parameters() -> None:
    assert set(PARAMETERS) == set(MODELS)
    for name, billions in PARAMETERS.items():
        decoder = abstract_decoder(read_config(MODELS[name]), BACKENDS["slots"], "bfloat16")
        # A router's correction is in float32.
        assert all_bytes(decoder) / 2e9 == pytest.approx(billions, rel=0.003), name


@pytest.mark.slow
def test_in_mxfp4_gpt_oss_is_as_large_as_its_published_files() -> None:
    decoder = abstract_decoder(read_config(MODELS["gpt-oss-20b"]), BACKENDS["slots"], "bfloat16", quantization="mxfp4")
    assert all_bytes(decoder) / 1e9 == pytest.approx(13.76, rel=0.003)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_sizes_are_those_of_the_parameters_and_of_the_caches(quantization: None) -> None:
    config, batch, slots = tiny(), 3, 256
    row = size_up_cards(load_of(config, batch, slots), "L4", quantization)
    decoder = abstract_decoder(config, BACKENDS["fused"], "bfloat16", quantization=quantization)
    assert row["weights"] == all_bytes(decoder)
    heads, width = CONFIG["num_key_value_heads"], CONFIG["head_dim"]
    rows = batch * heads * slots * width * 2 * 2  # keys and values, of 2 bytes
    caches = rows * (config.num_hidden_layers + 1)  # the head has one layer
    assert caches < row["cache"] < caches + batch * slots * 4 + 10_000  # and the tokens, and small arrays
    assert row["memory"] == row["weights"] + row["head"] + row["cache"] and row["temporaries"] is None


def test_a_machine_divides_the_weights_as_its_mesh_does() -> None:
    config = tiny(num_key_value_heads=4, vocab_size=512)
    one, four = (size_up_cards(load_of(config), name, None) for name in ("H100", "4xh100"))
    assert four["mesh"] == "data=1,expert=4,tensor=1" and four["cards"] == "4xH100"
    parts = abstract_decoder(config, BACKENDS["fused"], "bfloat16")
    experts, embedding = all_bytes(parts.experts), all_bytes(parts.embed)
    assert one["weights"] / 4 < four["weights"] < one["weights"] - 0.75 * experts
    assert four["weights"] > embedding  # which every card has
    assert four["token_floor_ms"] < one["token_floor_ms"]


def test_what_holds_a_model_is_monotone_in_memory() -> None:
    cards = sorted(CARDS.values(), key=lambda card: card.memory)
    for memory in range(0, int(200e9), int(3e9)):
        for free in (0.0, MARGIN):
            shares = [share_of(memory, card, int(free * card.memory)) or math.inf for card in cards]
            assert shares == sorted(shares, reverse=True)
    assert [share_of(int(share * cards[0].memory), cards[0]) for share in (*SHARES, 0.96)] == [*SHARES, None]


def test_long_caches_of_many_sequences_leave_room_for_the_scores_of_a_prompt() -> None:
    config = tiny(max_position_embeddings=2**16)
    few, many = (size_up_cards(load_of(config, batch, 2**16), "L4", None) for batch in (1, 32))
    scores = 32 * CONFIG["num_attention_heads"] * 512 * 2**16 * 4
    assert few["fits"] and not many["fits"]
    assert many["memory"] + scores < 0.95 * many["available"] < many["memory"] + 2 * scores


def test_the_floor_of_one_card_is_that_of_the_roofline() -> None:
    config = tiny()
    load, one = load_of(config), MeshConfig()
    mesh = AbstractMesh(one.shape, AXES)
    target = abstract_round(Workload(config, load.draft, mesh, BACKENDS["fused"], TREE)).params.target
    for experts in (2, 3, 4):
        assert pass_bytes(config, target, one, experts) == verification_bytes(config, target, experts)
    token = verification_bytes(config, target, 2) / 936e9 * 1e3
    assert size_up_cards(load, "RTX3090", None)["token_floor_ms"] == pytest.approx(token, rel=1e-3)


def test_floors_shrink_with_a_budget_and_a_round_reads_more_than_a_token() -> None:
    config = tiny(num_experts=64, num_experts_per_tok=8)
    exact, limited = (size_up_cards(load_of(config, budget=b), "L4", None) for b in (None, BudgetConfig(16)))
    fewest, most = exact["round_floor_ms"]
    assert exact["token_floor_ms"] < fewest < most
    assert limited["round_floor_ms"][0] == fewest and fewest < limited["round_floor_ms"][1] < most
    experts = all_bytes(abstract_decoder(config, BACKENDS["fused"], "bfloat16").experts)
    # Four tokens select at most 32 of the 64 experts.
    assert most - limited["round_floor_ms"][1] == pytest.approx(experts * 16 / 64 / 300e9 * 1e3, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cards", "H1000"], "expected --cards of RTX3090, RTX4090"),
        (["--cards", "L4", "8xV100"], "expected --cards of RTX3090, RTX4090"),
        (["--cards", "16xH100"], "expected --cards of RTX3090, RTX4090"),
        (["--cards", "0xH100"], "expected --cards of RTX3090, RTX4090"),
        (["--cards", ""], "expected --cards of RTX3090, RTX4090"),
        (["--cards", "--slices", "v5e-1"], "expected either --slices of TPU chips or --cards of GPUs; got both"),
        (["--cards", "H100", "--expert-budget", "4"], "expected an expert budget from 8 to 64"),
        (["--cards", "H100", "--mesh", "tensor=2"], "expected 2 devices for a mesh of"),
        (["--cards", "5xH100"], "expected as many devices as can share the model"),
    ],
)
def test_what_cannot_be_planned_is_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "OLMoE-1B-7B", *flags]) == 2
    out, err = capsys.readouterr()
    notes = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert out == "" and len(notes) == 1 and notes[0].startswith(f"error: {said}")


def test_names_of_cards_are_read_as_they_are_written() -> None:
    assert all(parse_machine(name)[0] in CARDS for name in default_names())
    assert parse_machine("8x h100") == ("H100", 8) and parse_machine("rtx 4090") == ("RTX4090", 1)
    assert parse_machine("A100 80GB") == parse_machine("a100-80gb") == ("A100-80GB", 1)


def test_cards_are_listed_up_to_the_first_machine_that_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moespec_jax.plan.cards.CARDS", {"H100": CARDS["H100"]})
    assert main(["--model", "Mixtral-8x7B", "--quantization", "none", "--cards", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (
        err.startswith("note: 5% of a card or more are kept free for temporary memory") and "jax" in report["versions"]
    )
    h100 = [row for row in report["rows"] if row["cards"].endswith("H100")]
    assert [row["cards"] for row in h100] == ["H100", "2xH100"]
    assert [row["fits"] for row in h100] == [False, True]
    assert "token_floor_ms" not in h100[0] and h100[1]["memory_fraction"] == 0.75
    table = cards_table(h100).splitlines()
    assert {line.count("|") for line in table} == {14}
    assert "| **no** | 94.8 |" in table[2] and "| 1 x 1 x 2 | yes |" in table[3]


def test_the_committed_table_is_what_the_command_computes() -> None:
    report = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "plan_cards.json").read_text())
    assert {row["model"] for row in report["rows"]} == set(MODELS)
    row = next(row for row in report["rows"] if row["model"] == "OLMoE-1B-7B" and row["cards"] == "H100")
    config, tree = read_config(MODELS["OLMoE-1B-7B"]), TreeConfig(**report["tree"])
    load = Load(config, draft_config("OLMoE-1B-7B", config), tree, report["cache_slots"], 1, None, None)
    assert {"model": "OLMoE-1B-7B", **size_up_cards(load, "H100", None)} == row


@pytest.mark.slow
@pytest.mark.skipif(not WITH_COMPILER, reason='the CUDA compiler is not installed: pip install "jax[cuda12]"')
@pytest.mark.parametrize("name", ["RTX4090", "2xA100-80GB"])
def test_temporaries_are_compiled(name: str, tmp_path: Path) -> None:
    """A process of its own, because the compiler stays with the process that loads it."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG | {"vocab_size": 1024}))
    flags = ["--model", str(file), "--cards", name, "--quantization", "none", "--tree-size", "4", "--json"]
    (done,) = run_processes(["-m", "moespec_jax.plan", *flags, "--cache-slots", "256"], devices=1)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(done.stdout)["rows"]
    assert row["compiled_for"] == {"RTX4090": "sm_89", "2xA100-80GB": "sm_80"}[name] and "note:" not in done.stderr
    # A chunk of 128 tokens has scores of every head over 256 slots.
    scores = 128 * CONFIG["num_attention_heads"] // row["devices"] * 256 * 4
    assert scores <= row["temporaries"] < 100e6
    assert row["memory"] == row["weights"] + row["head"] + row["cache"] + row["temporaries"]
