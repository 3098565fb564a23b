"""Homes that copy although weights are computed on where they live, so that a CPU alone can test what moves them."""

import lowtide.fusing


def stream_on_cpu(monkeypatch):
    """``weights="cpu"`` copies also where host memory is what is computed on."""
    monkeypatch.setattr(lowtide.fusing, "_only_real_moves", lambda wanted, device: wanted)
    return monkeypatch
