"""Results of a study, from the values of its ledger: tables, pictures and the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from moespec_jax.config import DecoderConfig
from moespec_jax.files import write_text
from moespec_jax.measure.ledger import Ledger
from moespec_jax.study import sheets
from moespec_jax.study.conclusion import Finding, finding_budgets, finding_rows, findings, subjects
from moespec_jax.study.measure import OWN, Plan
from moespec_jax.study.page import Section, page
from moespec_jax.study.rows import (
    ALL,
    HELD,
    Row,
    acceptance_rows,
    coactivation_rows,
    frontier_rows,
    mass_rows,
    pair_counts,
    reconstruction_rows,
    throughput_rows,
    union_rows,
)
from moespec_jax.study.rules import PAPER
from moespec_jax.study.style import LOOKS, exactness_note
from moespec_jax.study.tables import (
    frontier_table,
    mass_table,
    plain_table,
    speed_table,
    write_csv,
)

PAGE = "study.html"
Tables = dict[str, list[Row]]


def write_report(
    config: DecoderConfig,
    plan: Plan,
    sets: Sequence[str],
    ledger: Ledger,
    about: Mapping[str, str],
    command: str,
    directory: Path,
) -> str:
    """Write all files to `directory`; returns the text to print: divergence by rule and budget, and the findings."""
    tables = all_rows(config, plan, sets, ledger)
    stamp = {name: about[name] for name in ("model", "device", "dtype", "jax", "moespec_jax")}
    for name, rows in tables.items():
        write_csv(directory / f"{name}.csv", rows, stamp)
    draw_all(config, plan, sets, ledger, tables, about, directory)
    found = findings(config, plan, sets, ledger)
    facts = _facts(config, plan, sets, tables, about, command)
    sections = _sections(config, plan, sets, tables)
    write_text(directory / PAGE, page("Study of routing, trees and expert budgets", facts, found, sections, directory))
    over = _first_text(sets, tables["frontier"])
    return (
        plain_table(frontier_table(over, finding_budgets(config, plan)))
        + "\n"
        + "\n\n".join(_printed(one) for one in found)
    )


def _printed(found: Finding) -> str:
    return "\n".join([found.whole, *(f"  - {line}" for line in found.each)])


def all_rows(config: DecoderConfig, plan: Plan, sets: Sequence[str], ledger: Ledger) -> Tables:
    """Build the rows of every table, by the table's name."""
    tables = {
        "unions": union_rows(config, sets, ledger),
        "kept_mass": mass_rows(sets, ledger),
        "frontier": frontier_rows(config, plan, sets, ledger),
        "reconstruction": reconstruction_rows(config, plan, sets, ledger),
        "coactivation": coactivation_rows(sets, ledger),
        "acceptance": acceptance_rows(sets, ledger),
    }
    if len(plan.rules) > 1:
        tables["finding"] = finding_rows(config, plan, sets, ledger)
    return tables | ({"throughput": throughput_rows(plan, sets, ledger)} if plan.timed_prompts else {})


def draw_all(
    config: DecoderConfig,
    plan: Plan,
    sets: Sequence[str],
    ledger: Ledger,
    tables: Tables,
    about: Mapping[str, str],
    directory: Path,
) -> None:
    """Draw every picture, with its sample, model and device at the foot."""
    first = _first_text(sets, tables["frontier"])
    each = f"{len(sets)} set{'s' * (len(sets) > 1)}"
    tokens = f"{first[0]['texts']} texts of {plan.tokens} tokens, {first[0]['set']}"
    layers = pair_counts(sets, ledger)
    counted = int(next(iter(layers.values())).diagonal().sum()) // config.num_experts_per_tok
    count, nodes = _span(tables["acceptance"], "texts"), _span(tables["reconstruction"], "rows")
    seen = f"{_span(tables['unions'], 'trees')} trees a set; {each}; exact"
    by_text = [row for row in tables["frontier"] if row["set"] != ALL]
    drawn = {
        "unions": (sheets.unions_sheet(config, tables["unions"]), seen),
        "kept_mass": (sheets.mass_sheet(config, tables["kept_mass"]), seen),
        "frontier": (
            sheets.frontier_sheet(first, _title(first)),
            f"{tokens}; shaded: 95 % of a bootstrap; {_note(first)}",
        ),
        "frontier_by_text": (
            sheets.texts_sheet(by_text),
            f"{plan.tokens} tokens of {count} texts each; shaded: 95 % of a bootstrap over texts; {_note(by_text)}",
        ),
        "reconstruction": (
            sheets.reconstruction_sheet(tables["reconstruction"]),
            f"{nodes} nodes of each of {each}; {_note(tables['reconstruction'])}",
        ),
        "coactivation": (sheets.coactivation_sheet(layers), f"{counted} tokens of {each}; exact"),
        "acceptance": (
            sheets.acceptance_sheet(tables["acceptance"]),
            f"{count} texts each; shaded: 95 % of a bootstrap over texts; exact",
        ),
    }
    if "finding" in tables:
        over = next(iter(subjects(sets)))
        rows = [row for row in tables["finding"] if row["over"] == over]
        sample = f"{tokens}; lines: 95 % of a paired bootstrap; {_note(rows)}"
        drawn["finding"] = (sheets.finding_sheet(rows, PAPER), sample)
    if "throughput" in tables:
        some = f"{plan.timed_prompts} prompts a set, {plan.timed_tokens} tokens each"
        drawn["throughput"] = (
            sheets.speed_sheet(tables["throughput"]), f"{some}; median and range of {plan.repeats} turns, batch 1"
        )  # fmt: skip
    pale = "; pale: other rules" if set(plan.rules) - set(LOOKS) else ""
    for name, (figure, sample) in drawn.items():
        sample += pale if name in ("frontier", "frontier_by_text", "reconstruction") else ""
        sheets.save(figure, directory / f"{name}.png", f"{sample}\n{_stamp(about)}")


def _note(rows: Sequence[Row]) -> str:
    """Exactness of the rows under a budget."""
    return exactness_note(row["output"] for row in rows if row["budget"] is not None)


def _span(rows: Sequence[Row], column: str) -> str:
    """Format the values of a column: `24`, or `8 to 24` where sets differ."""
    counts = [row[column] for row in rows]
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _stamp(about: Mapping[str, str]) -> str:
    return (
        f"{about['model']}, {about['draft_model']}, trees {about['tree']}; {about['device']}, {about['dtype']};"
        f" moespec_jax {about['moespec_jax']}, jax {about['jax']}"
    )


def _first_text(sets: Sequence[str], frontier: Sequence[Row]) -> list[Row]:
    """Select the rows of the own texts of all sets, or of the only set."""
    over = ALL if len(sets) > 1 else sets[0]
    return [row for row in frontier if row["set"] == over and row["text"] == OWN]


def _title(rows: Sequence[Row]) -> str:
    return f"{rows[0]['set']}, {rows[0]['text']}"


def _facts(
    config: DecoderConfig, plan: Plan, sets: Sequence[str], tables: Tables, about: Mapping[str, str], command: str
) -> dict[str, str]:
    experts = f"{config.num_experts} experts in each of {config.num_sparse_layers} layers, {config.num_experts_per_tok}"
    texts = {row["set"]: row["texts"] for row in tables["frontier"] if row["text"] == OWN}
    return {
        "model": f"{about['model']} ({config.model_type}); {experts} a token",
        "draft head": f"{about['draft_model']}; trees {about['tree']} (size/depth/top-k)",
        "device": f"{about['device']}, {about['dtype']}",
        "prompts": ", ".join(f"{name} ({texts[name]})" for name in sets),
        "versions": f"moespec_jax {about['moespec_jax']}, jax {about['jax']}",
        "command": command,
    }


def _sections(config: DecoderConfig, plan: Plan, sets: Sequence[str], tables: Tables) -> list[Section]:
    budgets = finding_budgets(config, plan)
    texts = {}
    for row in tables["frontier"]:
        texts.setdefault((row["set"], row["text"]), []).append(row)
    by_text = [(_title(rows), frontier_table(rows, budgets)) for rows in texts.values()]
    least = f"least_budget_for_{HELD:.0%}"
    found = [
        Section("Rules compared with MoE-Spec's own", _FINDING, "finding.png"),
        Section("Divergence and acceptance by budget", _FRONTIER, "frontier.png", by_text),
        Section("Divergence by set and kind of text", _TEXTS, "frontier_by_text.png"),
        Section("Speed, and agreement with plain decoding", _SPEED, "throughput.png", _speed_tables(tables)),
        Section("Distinct experts by tree size", _UNIONS, "unions.png"),
        Section(
            "Router probability kept by budget",
            _MASS,
            "kept_mass.png",
            [("", mass_table(tables["kept_mass"], least, config.num_experts))],
        ),
        Section("Error of the experts' output", _RECONSTRUCTION, "reconstruction.png"),
        Section("Experts selected together", _COACTIVATION, "coactivation.png"),
        Section("Acceptance by depth", _ACCEPTANCE, "acceptance.png"),
    ]
    absent = {f"{name}.png" for name in ("finding", "throughput") if name not in tables}
    return [section for section in found if section.picture not in absent]


def _speed_tables(tables: Tables) -> list[tuple[str, list[list[str]]]]:
    rows = tables.get("throughput", [])
    return [
        (name, speed_table([r for r in rows if r["set"] == name])) for name in dict.fromkeys(r["set"] for r in rows)
    ]


_FINDING = (
    "Divergence of each rule divided by that of MoE-Spec's own rule on the same texts. Bars are 95 % intervals of a"
    " bootstrap over texts, with the same draws for both rules. Circles: rules that prune no drafted token. Triangles:"
    " rules that prune drafted tokens whose experts are not read, and therefore gain fewer tokens a round."
)
_FRONTIER = (
    "Texts are teacher-forced through verifications under the budget. Divergence is KL(exact || budgeted) of the next"
    " token after the same prefix, in nats. Own text is the target's exact greedy continuation of the prompts. All"
    " budgeted rows are lossy except those marked exact, whose divergence of 0 is not shown on a logarithmic axis."
)
_TEXTS = "Given text is the text of the held-out modules after the prompt. It is not in general the target's own."
_SPEED = (
    "Greedy generation, one prompt at a time, all cases in turns in one process; shaded: range of the turns. Agreement"
    " is the share of plain decoding's tokens before the first that differs. One early difference has a large weight"
    " where prompts are few."
)
_UNIONS = (
    "Number of distinct experts that the nodes of a draft tree select together, mean of trees and layers. Smaller trees"
    " of equal depth and top-k are the best-scored nodes of the large one. Uniform choice: expectation of independent,"
    " uniformly distributed choices."
)
_MASS = (
    "Router probability summed over the nodes of a tree: share of the B experts with the largest sums, mean of trees"
    " and layers."
)
_RECONSTRUCTION = (
    "Squared error of the routed experts' output under a budget, divided by the squared output, at the inputs of exact"
    " verifications: the error of a layer does not contain that of earlier layers. Pruned nodes are left out."
    " MoE-Spec's score weighs all nodes equally; only committed nodes affect the output."
)
_COACTIVATION = (
    "Lift: how often the same token selects both experts of a pair, divided by the expectation for independent choices"
    " at each expert's own frequency; from plain passes over the texts. Experts are ordered by hierarchical clustering."
)
_ACCEPTANCE = (
    "Share of rounds that commit a node of each depth, without a budget. On own text this is the acceptance of greedy"
    " decoding; on given text, how often the head predicts the text."
)
