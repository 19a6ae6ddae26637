"""NVIDIA cards that a model may run on, by name: `H100`, or `8xH100` for a node."""

import re
from typing import NamedTuple

from moespec_jax.errors import RequestError


class Card(NamedTuple):
    """Card, which stands for its `jax.Device` where a back-end is chosen.

    Fields:
        gib: memory that CUDA reports, of which JAX reserves a share, in GiB: the least of what was seen, since
            drivers and error correction take some of what is sold.
        bandwidth: published bandwidth of its memory in GB/s (10^9).
        compute_capability: as CUDA names it.
        counts: numbers of cards in machines that are sold.
    """

    gib: float
    bandwidth: float
    compute_capability: str
    counts: tuple[int, ...] = (1,)
    platform = "gpu"

    @property
    def memory(self) -> int:
        """Bytes of memory."""
        return int(self.gib * 2**30)

    @property
    def described(self) -> str:
        """GPU among `cuda.GPUS` for which its programs are compiled: of its generation, else of the one before."""
        major, minor = map(int, self.compute_capability.split("."))
        return "sm_90" if major >= 9 else f"sm_{major}{9 if minor >= 9 else 0}"


_NODE = (1, 2, 4, 8)
# Bandwidths are NVIDIA's, of data sheets and product pages; of H100, H200 and B200 those of the SXM modules.
CARDS = {
    "RTX3090": Card(23.5, 936, "8.6"),
    "RTX4090": Card(23.5, 1008, "8.9"),
    "RTX5090": Card(31.3, 1792, "12.0"),
    "A10G": Card(22.0, 600, "8.6", _NODE),
    "L4": Card(22.0, 300, "8.9", _NODE),
    "L40S": Card(44.3, 864, "8.9", _NODE),
    "A100-40GB": Card(39.3, 1555, "8.0", _NODE),
    "A100-80GB": Card(79.1, 2039, "8.0", _NODE),
    "H100": Card(79.1, 3350, "9.0", _NODE),
    "H200": Card(139.7, 4800, "9.0", _NODE),
    "B200": Card(178.3, 8000, "10.0", _NODE),
}
MOST = 8


def default_names() -> list[str]:
    """List the machines of every card, from the smallest."""
    return [machine(name, count) for name, card in CARDS.items() for count in card.counts]


def machine(name: str, count: int) -> str:
    """Name `count` cards in one machine."""
    return name if count == 1 else f"{count}x{name}"


def parse_machine(text: str) -> tuple[str, int]:
    """Find the name of the card, and the number of them in a machine: `8xh100` is ("H100", 8).

    Raises:
        RequestError: there is no such card, or a machine has not so many.
    """
    found = re.fullmatch(r"(?:(\d{1,3})x)?(.+)", re.sub(r"[\s_-]", "", text), re.IGNORECASE)
    names = {name.replace("-", "").casefold(): name for name in CARDS}
    count = int(found[1] or 1) if found else 0
    if found is None or found[2].casefold() not in names or not 1 <= count <= MOST:
        raise RequestError(
            f"expected --cards of {', '.join(CARDS)}, or up to {MOST} of one as in {MOST}xH100; got {text!r}"
        )
    return names[found[2].casefold()], count
