"""Pictures hold what they are about: nodes where the tree has them, edges, masks, counts, marked tokens."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle

from moespec_jax.measure import plots as pictures
from moespec_jax.measure.plots import ACCEPTED

#        0
#      / | \
#     1  2  3
#    / \     \
#   4   5     6
PARENTS = [-1, 0, 0, 0, 1, 1, 3]
LABELS = ["a", "b", "c", "$d$", "e", "f", "g"]
CHANCES = [1.0, 0.6, 0.2, 0.1, 0.3, 0.2, 0.05]


@pytest.fixture
def axes() -> Axes:
    return Figure(figsize=(6, 4)).subplots()


def drawn(axes: Axes) -> None:
    """What cannot be drawn, or not without a warning, fails here."""
    axes.figure.draw_without_rendering()


def test_nodes_stand_at_their_depth_and_leaves_in_order() -> None:
    place = pictures.node_positions(PARENTS)
    assert place[:, 0].tolist() == [0, 1, 1, 1, 2, 2, 2]
    leaves = [4, 5, 2, 6]
    assert place[leaves, 1].tolist() == [0, 1, 2, 3]
    assert place[1, 1] == 0.5 and place[3, 1] == 3 and place[0, 1] == (0.5 + 3) / 2


def test_tree_has_an_edge_for_every_child_and_colours_the_accepted_path(axes: Axes) -> None:
    pictures.draw_tree(axes, PARENTS, LABELS, CHANCES, accepted=[1, 5], bonus="h")
    drawn(axes)
    place = pictures.node_positions(PARENTS)
    edges = {tuple(map(tuple, line.get_xydata().tolist())): line for line in axes.lines if line.get_linestyle() == "-"}
    expected = {(tuple(place[p]), tuple(place[n])): n for n, p in enumerate(PARENTS) if p >= 0}
    assert edges.keys() == expected.keys()
    for ends, node in expected.items():
        assert same_color(edges[ends].get_color(), ACCEPTED) == (node in (1, 5))
    (dotted,) = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert tuple(dotted.get_xydata()[0]) == tuple(place[5])
    texts = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert len(texts) == len(PARENTS) + 1, "two boxes at one place"
    for node, (label, chance) in enumerate(zip(LABELS, CHANCES, strict=True)):
        shown = texts[tuple(place[node])]
        assert shown.startswith(f"{node}  {label}\n")
        assert float(shown.split("\n")[1].rstrip("%")) == pytest.approx(100 * chance)


def test_a_bonus_after_a_node_with_children_stands_apart(axes: Axes) -> None:
    pictures.draw_tree(axes, PARENTS, LABELS, CHANCES, accepted=[1], bonus="h")
    assert len({tuple(text.get_position()) for text in axes.texts}) == len(PARENTS) + 1


def test_mask_shows_the_text_before_and_ancestors(axes: Axes) -> None:
    pictures.draw_mask(axes, PARENTS, LABELS, accepted=[1, 5])
    drawn(axes)
    cells = np.asarray(axes.images[0].get_array())
    for row in range(len(PARENTS)):
        seen, node = set(), row
        while node >= 0:
            seen.add(node)
            node = PARENTS[node]
        visible = (cells[row] < 1).any(axis=-1)
        assert visible.tolist() == [True] + [column in seen for column in range(len(PARENTS))]
        coloured = cells[row, 0, 0] != cells[row, 0, 2]
        assert coloured == (row in (0, 1, 5))
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{i}  {text}" for i, text in enumerate(LABELS)]


def test_union_and_counts_are_those_of_a_plain_count(axes: Axes) -> None:
    chosen = np.random.default_rng(0).random((2, 5, 6)) < 0.3
    pictures.draw_union(axes, chosen)
    drawn(axes)
    for layer in range(2):
        union = [len(set(np.nonzero(chosen[layer, : n + 1])[1].tolist())) for n in range(5)]
        assert axes.lines[layer].get_ydata().tolist() == union
    counted = Figure().subplots()
    pictures.draw_experts(counted, chosen)
    for layer in range(2):
        counts = sorted((int(chosen[layer, :, e].sum()) for e in range(6)), reverse=True)
        shown = {(t.get_position()[1], t.get_position()[0]): int(t.get_text()) for t in counted.texts}
        assert [shown.get((layer, rank), 0) for rank in range(6)] == counts


def test_text_is_set_in_a_grid_and_marked_tokens_have_a_ground(axes: Axes) -> None:
    tokens = ["ab", " cd", "\n", "  e", "fgh\ni", "$x$"]
    pictures.draw_text(axes, tokens, [False, True, False, True, False, False], columns=5, lines=7)
    drawn(axes)
    grounds = [p for p in axes.patches if isinstance(p, Rectangle)]
    # " cd" ends line 0, and "  e" begins line 1.
    assert [(r.get_x(), r.get_width()) for r in grounds] == [(2, 3), (0, 3)]
    assert grounds[0].get_y() - grounds[1].get_y() == 2
    starts = [p.get_path().get_extents().x0 for p in axes.patches if isinstance(p, PathPatch)]
    assert np.floor(starts).tolist() == [0, 3, 2, 0, 0, 1]
    assert axes.get_xlim() == (0, 5)
    assert axes.get_ylim()[0] == -13


def test_tokens_without_a_partner_are_marked() -> None:
    one, other = [1, 2, 3, 4, 5], [1, 3, 9, 5]
    assert pictures.differing(one, other) == [False, True, False, True, False]
    assert pictures.differing(other, one) == [False, False, True, False]
    assert pictures.differing(one, one) == [False] * 5
    assert pictures.differing([7], []) == [True]


def test_labels_show_white_space_and_are_cut() -> None:
    texts = {1: " a\n", 2: "\t", 3: "abcdefghijklmnop"}
    assert pictures.token_labels(lambda ids: texts[ids[0]], [1, 2, 3], longest=6) == ["·a⏎", "→", "abcde…"]
    assert pictures.token_labels(lambda ids: None, [5]) == ["5"]
