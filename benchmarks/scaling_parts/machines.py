"""Machines that are common, by their makers' figures."""

from __future__ import annotations

import dataclasses

from lowtide.planning import Link, Speeds
from lowtide.planning.speeds import ASSUMED, NAMES

GIB = 2**30
PCIE4, PCIE5 = 32e9, 64e9  # bytes a second of 16 lanes in one direction, before any overhead
NVLINK = 450e9  # of an H100 in one direction, half of the 900 GB/s of its data sheet
OF_PEAK_BUS = ASSUMED["to_device"] / PCIE4  # what of a bus is used: the planner's assumption
OF_PEAK_MEMORY = 0.8  # the planner's assumption for updates, too
USABLE = 0.92  # of a card's memory: the rest is CUDA's and the allocator's
SYSTEM_BYTES = 8 * GIB  # of host memory


@dataclasses.dataclass(frozen=True)
class Machine:
    """A computer with one or several cards.

    Attributes:
        name: for people.
        peak: FLOP/s of a card in dense products of 16-bit matrices with float32 sums.
        memory: bytes a second of a card.
        device: bytes of a card.
        host: bytes of host memory that are assumed to be in the machine.
        pcie: bytes a second in one direction, nominal.
        efficiency: share of the peak, or the name of a constant that was fitted.
        source: of ``peak`` and ``memory``.
        cards: how many.
        link: bytes a second between cards; None for what was fitted.
    """

    name: str
    peak: float
    memory: float
    device: int
    host: int
    pcie: float
    efficiency: float | None
    source: str
    cards: int = 1
    link: float | None = None

    def speeds(self, efficiency: float) -> Speeds:
        """What the planner works with; ``efficiency`` where the machine has none of its own."""
        bus = OF_PEAK_BUS * self.pcie
        return Speeds(
            flops=self.peak * (efficiency if self.efficiency is None else self.efficiency),
            to_device=bus, from_device=bus, disk_read=ASSUMED["disk_read"], disk_write=ASSUMED["disk_write"],
            sources=dict.fromkeys(NAMES, "assumed"), memory=OF_PEAK_MEMORY * self.memory,
        )  # fmt: skip

    def between_cards(self, fitted: float) -> Link:
        """The link; ``fitted`` where the machine has none of its own."""
        rate = fitted if self.link is None else OF_PEAK_MEMORY * self.link
        return Link(rate, rate, "assumed")


GA102 = "NVIDIA Ampere GA102 whitepaper"
ADA = "NVIDIA Ada GPU architecture whitepaper"
BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper"
A100_EFFICIENCY, H100_EFFICIENCY = 0.5, 0.4
A100_SOURCE = "arXiv 2205.05198, table 5, has 44 to 57 % of the hardware's peak"
H100_SOURCE = "arXiv 2407.21783, table 4, has 38 to 43 % in pre-training"

RTX3090 = Machine("RTX 3090", 71e12, 936e9, 24 * GIB, 128 * GIB, PCIE4, None, GA102)
RTX4090 = Machine("RTX 4090", 165.2e12, 1008e9, 24 * GIB, 128 * GIB, PCIE4, None, ADA)
H100 = Machine("H100 SXM", 989e12, 3350e9, 80 * GIB, 256 * GIB, PCIE5, H100_EFFICIENCY, "NVIDIA H100 data sheet")
MACHINES = (
    Machine("RTX 3060 12 GB", 25.5e12, 360e9, 12 * GIB, 64 * GIB, PCIE4, None, "NVIDIA's product page: twice its 12.7 TFLOP/s in float32, as in the GA102 whitepaper"),
    Machine("RTX 4070 Ti", 80.2e12, 504e9, 12 * GIB, 64 * GIB, PCIE4, None, "NVIDIA's product page: twice its 40.1 TFLOP/s in float32, as in the Ada whitepaper"),
    dataclasses.replace(RTX3090, name="RTX 3090, 64 GB of host memory", host=64 * GIB),
    RTX3090,
    RTX4090,
    Machine("RTX 5090", 209.5e12, 1792e9, 32 * GIB, 128 * GIB, PCIE5, None, BLACKWELL),
    Machine("A100 80 GB", 312e12, 2039e9, 80 * GIB, 256 * GIB, PCIE4, A100_EFFICIENCY, "NVIDIA A100 data sheet"),
    H100,
    dataclasses.replace(RTX3090, name="8x RTX 3090", host=512 * GIB, cards=8),
    dataclasses.replace(H100, name="8x H100 SXM", host=1024 * GIB, cards=8, link=NVLINK),
)  # fmt: skip
