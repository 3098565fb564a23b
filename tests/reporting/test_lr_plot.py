import math

import pytest

from lowtide.reporting import plot_lr_curve

CURVE = {
    "title": "Title",
    "subtitle": "subtitle",
    "rates": [1e-3, 1e-2, 1e-1],
    "losses": [2.0, 1.0, math.inf],
    "smoothed": [1.9, 1.2, math.nan],
    "loss_before": 2.1,
    "loss_label": "loss",
}


@pytest.mark.parametrize(("recommended", "lr_diverged"), [(1e-2, 1e-1), (1e-2, None), (None, None)])
def test_writes_a_png_of_the_stated_size(tmp_path, recommended, lr_diverged):
    path = tmp_path / "plot.png"
    plot_lr_curve(path, **CURVE, recommended=recommended, lr_diverged=lr_diverged, notes=["a long note " * 30])
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1350, 780)


def test_overwrites_nothing(tmp_path):
    path = tmp_path / "plot.png"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        plot_lr_curve(path, **CURVE, recommended=None, lr_diverged=None)
    assert path.read_text() == "precious"
