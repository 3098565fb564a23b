"""The cost of a fused update per parameter tensor, beside a plain backward and a foreach SGD step. About a minute.

    python benchmarks/many_tensors.py [--rounds 30]

Both run in one process, in turn, on the same shapes; the figure is the ratio of the medians of backward plus step.
"""

import argparse
import csv
import datetime
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import lowtide

SHAPES = ((3000, 16, 8, 2.0), (300, 512, 64, 1.05))  # tensors, width, rows of the input, largest ratio we are held to


class Chain(nn.Module):
    """A product of many square matrices. They are orthogonal: products of random ones run into denormal numbers."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.linalg.qr(torch.randn(width, width))[0]) for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = x @ weight
        return x.mean()


def step_time(model: Chain, x: torch.Tensor, optimizer: torch.optim.Optimizer, backward) -> float:
    """Seconds for the backward and the step; the forward is not counted."""
    loss = model(x)
    start = time.perf_counter()
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def measure(count: int, width: int, rows: int, rounds: int) -> tuple[float, float]:
    """Median seconds of (plain, fused)."""
    torch.manual_seed(0)
    plain, fused, x = Chain(count, width), Chain(count, width), torch.randn(rows, width)
    sgd = torch.optim.SGD(plain.parameters(), lr=1e-7, foreach=True)
    lomo = lowtide.Lomo(fused.parameters(), lr=1e-7)
    engine = lowtide.fuse(fused, lomo)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 2):
        times[0].append(step_time(plain, x, sgd, lambda loss: loss.backward()))
        times[1].append(step_time(fused, x, lomo, engine.backward))
    return statistics.median(times[0][2:]), statistics.median(times[1][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = Path(__file__).parent / "results" / "many_tensors.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                ["date", "machine", "torch", "threads", "tensors", "width", "plain_s", "fused_s", "ratio", "bound"]
            )
        for count, width, rows, bound in SHAPES:
            plain, fused = measure(count, width, rows, options.rounds)
            ratio = fused / plain
            print(
                f"{count} tensors of {width} x {width}: plain {plain * 1e3:.1f} ms, fused {fused * 1e3:.1f} ms, "
                f"ratio {ratio:.2f} (bound {bound})"
            )
            row = [datetime.date.today(), platform.machine(), torch.__version__, options.threads, count, width]
            writer.writerow([*row, f"{plain:.4f}", f"{fused:.4f}", f"{ratio:.3f}", bound])


if __name__ == "__main__":
    main()
