"""Draft trees and their verification in plain Python: nodes that know their parents, lists, and no arrays.

Scores are added as NumPy float32 scalars, so that ties come out as they do in float32.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Row = Sequence[float]


@dataclasses.dataclass(eq=False)
class Node:
    """A drafted node. `flat` is its place in the pool, `slot` its row in the beam of its level (None: not in it)."""

    token: int
    score: np.float32
    parent: "Node | None"
    flat: int
    slot: int | None = None

    def line(self) -> list["Node"]:
        """The way here from the root, which is no `Node`."""
        return [*(self.parent.line() if self.parent else []), self]


def best(values: Row, count: int) -> list[int]:
    """Places of the largest values, best first, the earlier first among equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def grow(
    depth: int, top_k: int, first: Row, later: Callable[[int, Node], Row], target_ids: Sequence[int]
) -> tuple[list[Node], list[list[Node]]]:
    """The pool in flat order and the beams that were expanded; `later(expansion, node)` are log-probs after a node."""
    pool = [Node(target_ids[i], np.float32(first[i]), None, n) for n, i in enumerate(best(first, top_k))]
    beam, beams = list(pool), []
    for level in range(depth):
        for slot, node in enumerate(beam):
            node.slot = slot
        beams.append(beam)
        children = []
        for node in beam:
            row = later(level, node)
            for i in best(row, top_k):
                score = np.float32(node.score + np.float32(row[i]))
                children.append(Node(target_ids[i], score, node, len(pool) + len(children)))
        pool += children
        beam = [children[i] for i in best([child.score for child in children], top_k)]
    return pool, beams


def cut(pool: list[Node], size: int, root: int) -> tuple[list[int], list[int], list[np.float32]]:
    """Tokens, parents and scores of the root and the best `size - 1` of the pool."""
    kept = [pool[i] for i in sorted(best([node.score for node in pool], size - 1))]
    index = {id(node): i for i, node in enumerate(kept, 1)}
    parents = [index[id(node.parent)] if node.parent else 0 for node in kept]  # KeyError: a parent was not chosen
    return [root, *(n.token for n in kept)], [-1, *parents], [np.float32(0), *(n.score for n in kept)]


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """Node indices from the root to `node`."""
    return [*(path_to(parents, parents[node]) if parents[node] >= 0 else []), node]


def greedy(tokens: Sequence[int], parents: Sequence[int], logits: Sequence[Row]) -> tuple[list[int], int]:
    """The longest matching stretch of all ways to a leaf, and the token after it."""
    choice = [row.index(max(row)) for row in map(list, logits)]
    longest = [0]
    for leaf in range(len(tokens)):
        if leaf in parents:
            continue
        path = path_to(parents, leaf)
        length = 1
        while length < len(path) and tokens[path[length]] == choice[path[length - 1]]:
            length += 1
        longest = max(longest, path[:length], key=len)
    return longest, choice[longest[-1]]
