import math

import pytest

from lowtide.reporting import MemoryBar, plot_run, running_mean
from lowtide.units import GIB

BARS = [MemoryBar("lowtide", GIB, GIB // 4, ours=True), MemoryBar("AdamW", 3 * GIB, GIB // 4)]


@pytest.mark.parametrize("losses", [[2.0, 1.0, 0.5], [1.0], [float("nan"), 1.0], [float("nan")], []])
@pytest.mark.parametrize("memory", [BARS, BARS[:1], []])
def test_writes_a_png_of_the_stated_size(tmp_path, losses, memory):
    path = tmp_path / "plot.png"
    plot_run(path, title="Title", subtitle="subtitle", losses=losses, memory=memory, note="note")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1650, 735)


def test_says_the_finding_and_the_figures(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figures = []
    draw = FigureCanvasAgg.print_png
    monkeypatch.setattr(
        FigureCanvasAgg, "print_png", lambda self, path: (figures.append(self.figure), draw(self, path))[1]
    )
    plot_run(tmp_path / "plot.png", title="It learned", subtitle="how", losses=[2.0, 1.0], memory=BARS, note="small")
    words = " | ".join(text.get_text() for text in figures[0].findobj(Text))
    for wanted in ("It learned", "how", "small", "1.00 GiB", "3.00 GiB", "mean of the last 2 steps: 1.50", "step"):
        assert wanted in words


def test_running_mean_leaves_out_what_is_not_a_number():
    assert running_mean([4.0, 2.0, float("nan"), 0.0], 2) == [4.0, 3.0, 2.0, 0.0]
    assert math.isnan(running_mean([float("nan")], 3)[0])
