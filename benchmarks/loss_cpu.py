"""Our sliced cross entropy beside plain logits and torch's linear_cross_entropy, forward and backward. About a minute.

    python benchmarks/loss_cpu.py [--tokens 1024]

Hidden size 2048, vocabulary 32000, in one process, in turn; medians, as ratios of the plain way.
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional

from lowtide.models.loss import linear_cross_entropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    labels = torch.randint(32000, (options.tokens,))
    ways = {
        "plain": lambda x, w: functional.cross_entropy((x @ w.t()).float(), labels),
        "ours": lambda x, w: linear_cross_entropy(x, w, labels),
    }
    if hasattr(functional, "linear_cross_entropy"):
        chunked = torch.nn.LinearCrossEntropyOptions()
        ways["torch"] = lambda x, w: functional.linear_cross_entropy(x, w, labels, options=chunked)
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(options.tokens, 2048).to(dtype).requires_grad_()
        weight = (torch.randn(32000, 2048) / 50).to(dtype).requires_grad_()
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds + 1):
            for name, way in ways.items():
                hidden.grad = weight.grad = None
                start = time.perf_counter()
                way(hidden, weight).backward()
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        for name, seconds in medians.items():
            print(f"{dtype!s:15} {name:6} {seconds:6.2f} s, {seconds / medians['plain']:.2f}x plain")


if __name__ == "__main__":
    main()
