"""16-bit matrix products of a layer, forward and backward: torch's own beside float32 slices. A minute or two where they are slow.

python benchmarks/matmul16.py [--rows 64 256] [--threads 2]
"""

import argparse
import csv
import datetime
import time
from pathlib import Path

import torch

from lowtide.fused.matmul16 import computes_16bit, matmul

HIDDEN, INNER = 2048, 5632


def speed(product) -> float:
    """GFLOP/s of one (already prepared) product, timed for a second."""
    product()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 1.0:
        product()
        count += 1
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256], help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{torch.backends.cpu.get_cpu_capability()}; lowtide would use {'torch' if computes_16bit() else 'float32 slices'}"
    )
    path = Path(__file__).parent / "results" / "matmul16.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                [
                    "date",
                    "cpu",
                    "torch",
                    "threads",
                    "tokens",
                    "product",
                    "plain_gflops",
                    "slices_gflops",
                    "float32_gflops",
                ]
            )
        for rows in options.rows:
            x, weight, grad = torch.randn(rows, HIDDEN), torch.randn(INNER, HIDDEN), torch.randn(rows, INNER)
            for name, a, b in (
                ("forward", x, weight.t()),
                ("input gradient", grad, weight),
                ("weight gradient", grad.t(), x),
            ):
                narrow, narrow_b = a.bfloat16(), b.bfloat16()
                work = 2 * rows * HIDDEN * INNER / 1e9
                found = [
                    work * speed(lambda p=narrow, q=narrow_b: p @ q),
                    work * speed(lambda p=narrow, q=narrow_b: matmul(p, q)),
                    work * speed(lambda p=a, q=b: p @ q),
                ]
                print(
                    f"{rows} tokens, {name}: bfloat16 {found[0]:.1f}, float32 slices {found[1]:.1f}, float32 {found[2]:.1f} GFLOP/s"
                )
                start = [
                    datetime.date.today(),
                    torch.backends.cpu.get_cpu_capability(),
                    torch.__version__,
                    options.threads,
                ]
                writer.writerow([*start, rows, name, *(f"{each:.2f}" for each in found)])


if __name__ == "__main__":
    main()
