"""TPU slices by name, and what their chips can do. No jax: a name is refused before anything heavy is imported.

Sources: the system architecture pages of Cloud TPU for v5e, v5p and v6e. `hbm_gib` is what the TPU compiler lets one program
use, a little less than the chip has.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from cacherl_jax.config import ConfigError


@dataclass(frozen=True)
class Chip:
    hbm_gib: float
    flops: float  # a second, bfloat16 matrix products
    hbm_bytes: float  # a second
    ici_bytes: float  # a second, to its neighbours in the slice, all links together
    host: tuple[int, int, int]  # chips of a host in slices of more than one
    slices: tuple[str, ...]  # known sizes, smallest first


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {
    "v5e": Chip(15.75, 197e12, 819e9, 200e9, (2, 2, 1), FLAT),
    "v5p": Chip(95.0, 459e12, 2765e9, 600e9, (2, 2, 1), CUBES),
    "v6e": Chip(31.25, 918e12, 1640e9, 448e9, (2, 2, 1), FLAT),
}
GIB = 2**30
GPU = re.compile(r"gpu|cuda|nvidia|amd|rtx|^(a|b|h|l|t|p|gh|gb|mi|v1)\d{1,4}[sx]?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Topology:
    """`slices` slices of `size` chips each; `name` is how it is written."""

    kind: str
    size: str
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.size}" + (f"@{self.slices}" if self.slices > 1 else "")

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return self.slices * math.prod(map(int, self.size.split("x")))

    @property
    def host(self) -> tuple[int, int, int]:
        """Chips of one host. A slice of up to eight is taken to be one host's, as the single-host machines are."""
        x, y, z = (*map(int, self.size.split("x")), 1)[:3]
        return (x, y, z) if x * y * z <= 4 or (self.kind != "v5p" and x * y <= 8) else self.chip.host


def parse(text: str) -> Topology:
    """ "v5e:2x4" or, of two slices, "v5e:4x4@2". Raises ConfigError with the known ones."""
    name, _, count = text.strip().partition("@")
    kind, _, size = name.partition(":")
    known = "; ".join(f"{k}:{{{','.join(chip.slices)}}}" for k, chip in CHIPS.items())
    if kind not in CHIPS and GPU.search(kind):
        raise ConfigError(f"--topology {text!r}: plans are made by the TPU compiler, there is none for GPUs. Known: {known}")
    if kind not in CHIPS or size not in CHIPS[kind].slices:
        raise ConfigError(f"--topology {text!r} is not known. Known: {known}; @N behind one for N slices")
    if "@" in text and not (count.isdecimal() and int(count) > 0):
        raise ConfigError(f"--topology {text!r}: {count!r} is no number of slices; for two slices write {name}@2")
    return Topology(kind, size, int(count or 1))


def twice(topology: Topology) -> Topology | None:
    """The next larger slice of the same chips; None at the end of the list."""
    sizes = topology.chip.slices
    larger = sizes[sizes.index(topology.size) + 1 :]
    return Topology(topology.kind, larger[0], topology.slices) if larger else None
