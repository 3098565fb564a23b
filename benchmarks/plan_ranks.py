"""What the planner says of models that several GPUs share: an example, and the LOMO paper's Table 2. Nothing is measured.

    python benchmarks/plan_ranks.py

Prints the two tables of docs/planning.md. Speeds are those that the planner assumes where nothing is known: half the 71 TFLOP/s of an
RTX 3090, the card of that table, and 24 GB/s over PCIe, which is also the link.
"""

from __future__ import annotations

from typing import Any

import torch

from lowtide.models import find_blocks
from lowtide.planning import (
    Limits,
    Option,
    Sharding,
    StepShape,
    better_buy,
    compare_ranks,
    find_link,
    find_speeds,
    one_rank,
    rank_shape,
    sharded_footprint,
    sharded_time,
    step_time,
)
from lowtide.planning.sharded_time import Link

GIB = 2**30
# hidden, mlp, layers, heads of LLaMA (arXiv 2302.13971, table 2), whose vocabulary is 32000
LLAMA = {
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "30B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
}
# Table 2 of arXiv 2306.09782, rows of LOMO: GPUs, GB a GPU, tokens a second and GPU; 1024 tokens a GPU
PAPER = {"7B": (1, 13.61, 769.92), "13B": (2, 15.92, 66.19), "30B": (4, 19.78, 11.61), "65B": (8, 19.18, 4.93)}


def make_shape(name: str, **options: Any) -> StepShape:
    """The step of a LLaMA in bfloat16 on a GPU, without padding."""
    from transformers import LlamaConfig

    hidden, mlp, layers, heads = LLAMA[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    return StepShape(config, find_blocks=find_blocks, dtype=torch.bfloat16, masked=False, device="cuda", **options)


def example(link_rate: float) -> None:
    """LLaMA 13B with AdaLomo on 24 GiB cards."""
    shape = make_shape("13B", batch_size=16, seq_len=512, optimizer="adalomo")
    limits = Limits(24 * GIB, 64 * GIB, 0)
    speeds = find_speeds(dtype=shape.dtype, device="cuda", measure=False)
    link = Link(link_rate, link_rate, "given")
    single, _ = one_rank(shape, limits=limits, speeds=speeds)
    options = compare_ranks(shape, Sharding(8), single=single, limits=limits, speeds=speeds, link=link)
    for option in options:
        print(f"| {link_rate / 1e9:.0f} GB/s {_row(option)}")
    print(better_buy(options)[1])


def _row(option: Option) -> str:
    assert option.footprint is not None
    where = option.home if option.num_ranks == 1 else f"shared, {option.home}"
    return (
        f"| {option.num_ranks} | {where} | {'yes' if option.fits else 'no'} | {option.footprint.totals()['device'] / GIB:.1f} "
        f"| {option.step_s:.1f} | {option.tokens_per_s:.0f} | {option.tokens_per_rank_s:.0f} | {option.bottleneck} |"
    )


def paper() -> None:
    """The LOMO paper's Table 2."""
    for name, (num_ranks, paper_gib, paper_speed) in PAPER.items():
        shape = make_shape(name, batch_size=num_ranks, seq_len=1024, optimizer="lomo")
        speeds = find_speeds(dtype=shape.dtype, device="cuda", measure=False)
        sums = {}
        for reduce_dtype in ("auto", "weights"):
            kinds = sharded_footprint(shape, num_ranks, reduce_dtype=reduce_dtype).device
            sums[reduce_dtype] = sum(kinds.values()) / GIB
        if num_ranks == 1:
            step_s = step_time(shape, {unit.name: "device" for unit in shape.units}, "device", speeds).step_s
        else:
            sharding = Sharding(num_ranks)
            step_s = sharded_time(rank_shape(shape, sharding), sharding, speeds, find_link(speeds, "cuda")).step_s
        found = sums["auto"]
        print(
            f"| {name} | {num_ranks} | {paper_gib:.2f} | {found:.2f} | {found / paper_gib - 1:+.0%} | {sums['weights']:.2f} "
            f"| {sums['weights'] / paper_gib - 1:+.0%} | {paper_speed:.0f} | {1024 / step_s:.0f} |"
        )


if __name__ == "__main__":
    print("| link | GPUs | weights | fits | GiB a GPU | s a step | tokens/s | of each GPU | bound by |")
    print("|---|---|---|---|---|---|---|---|---|")
    example(24e9)
    example(1e9)
    print(
        "\n| LLaMA | GPUs | paper, GB | here, GiB | error | sums in 16 bits, GiB | error | paper, tokens/s and GPU | here |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    paper()
