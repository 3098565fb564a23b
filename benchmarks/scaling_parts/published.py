"""The model beside figures that others have published. Two constants are fitted to two rows of the LOMO paper, the rest is predicted."""

from __future__ import annotations

import dataclasses
import functools

from lowtide.planning import Sharding, Speeds, rank_shape, sharded_time, step_time
from lowtide.planning.sharded_time import Link

from .machines import RTX3090, RTX4090
from .shapes import homes, step_shape
from .tables import error, number, table

SEQ_LEN = 1024
# Table 2 of arXiv 2306.09782: model, optimizer, GPUs, tokens a second and GPU. One sequence of 1024 tokens a GPU, ZeRO-3 from two on.
TABLE_2 = (
    ("LLaMA 7B", "adamw", 8, 67.37),
    ("LLaMA 7B", "sgd", 8, 69.66),
    ("LLaMA 7B", "lomo", 1, 769.92),
    ("LLaMA 13B", "sgd", 8, 32.51),
    ("LLaMA 13B", "lomo", 2, 66.19),
    ("LLaMA 30B", "lomo", 4, 11.61),
    ("LLaMA 65B", "lomo", 8, 4.93),
)
PRODUCTS_ROW = ("LLaMA 7B", "lomo", 1)
LINK_ROW = ("LLaMA 7B", "sgd", 8)
FP16_SUMS = 330.3e12  # FLOP/s of an RTX 4090 with float16 sums, by the same whitepaper


@functools.cache
def fitted_efficiency() -> float:
    """Share of the RTX 3090's peak with which the model gives the row of one GPU."""
    _, _, _, speed = next(row for row in TABLE_2 if row[:3] == PRODUCTS_ROW)
    shape = step_shape("LLaMA 7B", 1, SEQ_LEN)
    time = step_time(shape, homes(shape, "device"), "device", RTX3090.speeds(1.0))
    return (time.compute_s - time.update_s) / (SEQ_LEN / speed - time.update_s)


@functools.cache
def fitted_link() -> float:
    """Bytes a second between RTX 3090s with which the model gives a row of eight."""
    model, optimizer, ranks, speed = next(row for row in TABLE_2 if row[:3] == LINK_ROW)
    return _step_of_ranks(model, optimizer, ranks, 1.0) / (SEQ_LEN / speed)


def _step_of_ranks(model: str, optimizer: str, ranks: int, link: float) -> float:
    """Seconds; DeepSpeed sends gradients in 16 bits."""
    sharding = Sharding(ranks, reduce_dtype="weights")
    rank = rank_shape(step_shape(model, ranks, SEQ_LEN, optimizer=optimizer), sharding)
    return sharded_time(rank, sharding, RTX3090.speeds(fitted_efficiency()), Link(link, link, "given")).step_s


def paper_table() -> str:
    """The LOMO paper's Table 2."""
    rows, errors, factors = [], [], []
    for model, optimizer, ranks, speed in TABLE_2:
        name = {"lomo": "LOMO", "sgd": "SGD", "adamw": "AdamW"}[optimizer]
        if ranks == 1:
            rows.append([model, name, "1", number(speed), number(speed), "fitted", "", ""])
            continue
        link = RTX3090.speeds(1.0).to_device
        fitted, nominal = (SEQ_LEN / _step_of_ranks(model, optimizer, ranks, rate) for rate in (fitted_link(), link))
        shown = "fitted" if (model, optimizer, ranks) == LINK_ROW else error(fitted, speed)
        factors.append(nominal / speed)
        errors += [] if (model, optimizer, ranks) == LINK_ROW else [fitted / speed - 1]
        rows.append(
            [model, name, str(ranks), number(speed), number(fitted), shown, number(nominal), error(nominal, speed)]
        )
    head = [
        "model",
        "optimizer",
        "GPUs",
        "paper, tokens/s and GPU",
        f"here, link of {fitted_link() / 1e9:.2g} GB/s",
        "error",
    ]
    head += [f"here, link of {RTX3090.speeds(1.0).to_device / 1e9:.0f} GB/s", "error"]
    constants = (
        f"Fitted: {fitted_efficiency():.3f} of the RTX 3090's {RTX3090.peak / 1e12:.0f} TFLOP/s in products, to the row of LOMO on one GPU; "
        f"{fitted_link() / 1e9:.2f} GB/s between cards, to the row of SGD with 7B on eight. The other five rows are predictions, "
        f"{min(errors):+.0%} to {max(errors):+.0%}. With {RTX3090.speeds(1.0).to_device / 1e9:.0f} GB/s, which one card has to the host, all rows of several cards are too fast by "
        f"factors of {min(factors):.1f} to {max(factors):.1f}."
    )
    return f"{table(head, rows)}\n\n{constants}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A published speed.

    Attributes:
        who: made it.
        what: was trained where.
        tokens_per_s: as published.
        model: a key of ``MODELS``.
        peak: FLOP/s of the card.
        speeds: of the machine, apart from products.
        home: of the weights.
        assumption: that the prediction needs besides the efficiency.
    """

    who: str
    what: str
    tokens_per_s: int
    model: str
    peak: float
    speeds: Speeds
    home: str
    assumption: str


ENOUGH = "a step has enough tokens to hide the transfers and what else happens once a step"
FIGURES = (
    Figure("torchtune 0.6.1", "Llama 3.1 8B, one RTX 4090", 1650, "Llama 3.1 8B", RTX4090.peak, RTX4090.speeds(1.0), "device",
           f"activations are recomputed; {ENOUGH}"),
    Figure("RoundPipe 0.1.1", "8B, one RTX 4090", 3142, "Llama 3.1 8B", FP16_SUMS, RTX4090.speeds(1.0), "host",
           f"the shape is that of Llama 3.1; float16 sums run at {FP16_SUMS / 1e12:.0f} TFLOP/s; {ENOUGH}"),
    Figure("RoundPipe 0.1.1", "32B, one RTX 4090", 740, "Qwen3 32B", FP16_SUMS, RTX4090.speeds(1.0), "host",
           "the shape is that of Qwen3; the rest as above"),
    Figure("MegaTrain", "14B, one RTX 3090", 341, "Qwen3 14B", RTX3090.peak, RTX3090.speeds(1.0), "host",
           f"the shape is that of Qwen3; {ENOUGH}"),
)  # fmt: skip
MANY = 256  # sequences of SEQ_LEN a step: enough in each of these


def predicted(figure: Figure) -> float:
    """Tokens a second."""
    shape = step_shape(figure.model, MANY, SEQ_LEN)
    speeds = dataclasses.replace(figure.speeds, flops=figure.peak * fitted_efficiency())
    time = step_time(shape, homes(shape, figure.home), "device", speeds)
    assert time.tokens_to_hide is not None and time.tokens_to_hide <= MANY * SEQ_LEN
    return MANY * SEQ_LEN / time.step_s


def others_table() -> str:
    """Figures of other programs, and the efficiency that each would need."""
    rows, needs = [], []
    for figure in FIGURES:
        found = predicted(figure)
        needed = figure.tokens_per_s / found * fitted_efficiency()
        needs.append(needed)
        cells = [figure.who, figure.what, f"{figure.tokens_per_s:,}", number(found), error(found, figure.tokens_per_s)]
        rows.append([*cells, f"{needed:.2f}", figure.assumption])
    head = ["who", "what", "published, tokens/s", "here, tokens/s", "error", "efficiency that gives it", "assumed"]
    plain = [
        predicted(dataclasses.replace(each, peak=RTX4090.peak)) / each.tokens_per_s - 1
        for each in FIGURES
        if each.peak == FP16_SUMS
    ]
    sums = (
        f"The efficiencies that would give the figures exactly lie between {min(needs):.2f} and {max(needs):.2f}; {fitted_efficiency():.2f} was fitted to "
        f"the paper. Without the assumption about float16 sums RoundPipe's rows would be {plain[0]:+.0%} and {plain[1]:+.0%}."
    )
    return f"{table(head, rows)}\n\n{sums}\n\n{_infinity()}"


def _infinity() -> str:
    """ZeRO-Infinity moves so much that the tokens of a step decide, and these are not known."""
    parts = []
    for model, speed in (("Llama 3.1 8B", 1843), ("Qwen3 32B", 218)):
        sharding = Sharding(8, reduce_dtype="weights", offload=True)
        rank = rank_shape(step_shape(model, 8, SEQ_LEN, optimizer="adamw"), sharding)
        link = Link(fitted_link(), fitted_link(), "given")
        time = sharded_time(rank, sharding, RTX4090.speeds(fitted_efficiency()), link)
        tokens = speed * max(time.link_s, time.bus_s)
        parts.append(f"{model.split()[-1]}: {speed:,} tokens/s would be those of a step of {number(tokens)} tokens")
    return (
        "DeepSpeed ZeRO-Infinity on eight RTX 4090, as RoundPipe measured it, is bound by what it moves, so that its speed is proportional to "
        "the tokens of a step, which are not known to us. With the link fitted above and no cost of AdamW on the host: "
        f"{'; '.join(parts)}. That is not a test. torchao's CPUOffloadOptimizer was measured on a vision model with a batch that is not known to us; "
        "the model says nothing about it. FlashOptim published memory only."
    )
