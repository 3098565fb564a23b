"""Tokens a second against tokens a step, for weights that are streamed."""

from __future__ import annotations

from pathlib import Path

from lowtide.planning import step_time

from .machines import H100, RTX3090, RTX4090
from .published import fitted_efficiency
from .shapes import homes, step_shape

MODEL, SEQ_LEN = "Qwen3 32B", 256
BATCHES = sorted({round(2 ** (quarter / 4)) for quarter in range(41)})
# machine, home, colour, line
LINES = (
    (H100, "host", "#5f3dc4", "-"),
    (RTX4090, "host", "#e8590c", "-"),
    (RTX3090, "host", "#0b7285", "-"),
    (RTX4090, "disk", "#e8590c", "--"),
    (RTX3090, "disk", "#0b7285", "--"),
)
WORDS = {"host": "weights in host memory", "disk": "weights on disk"}


def draw(path: Path) -> None:
    """The same bytes for the same numbers and version of matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "lowtide", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for machine, home, colour, line in LINES:
        speeds = machine.speeds(fitted_efficiency())
        points = []
        for batch in BATCHES:
            shape = step_shape(MODEL, batch, SEQ_LEN)
            time = step_time(shape, homes(shape, home), "device", speeds)
            points.append((batch * SEQ_LEN, batch * SEQ_LEN / time.step_s))
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=line, label=f"{machine.name}, {WORDS[home]}")
        corner = time.tokens_to_hide
        assert corner is not None
        of_a_token = (time.compute_s - time.update_s) / points[-1][0]
        step_s = corner * of_a_token + time.update_s + time.exposed_s
        axes.plot([corner], [corner / step_s], "o", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="tokens a step", ylabel="tokens a second, predicted")
    axes.set_title(f"{MODEL}, all weights streamed, sequences of {SEQ_LEN}; dots: from here on computation decides")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
