"""Helpers of the tests of streamed weights: a training run whose weights live somewhere, and lanes whose copies land late."""

import time

import torch

import lowtide
from helpers import tiny_batch, tiny_model
from lowtide.weights import streamed
from lowtide.weights.lanes import ThreadLane

RULES = {
    "lomo": lambda params: lowtide.Lomo(params, lr=0.05),
    "adalomo": lambda params: lowtide.AdaLomo(params, lr=5e-3),
}


class LateLane(ThreadLane):
    """Copies begin late: who does not wait for one sees what was there before."""

    delay_s = 0.0

    def submit(self, copy, after=()):
        def late():
            time.sleep(self.delay_s)
            copy()
            time.sleep(self.delay_s)

        return super().submit(late, after)


def late_lane(device, name, *, blocks_host=False):
    """In the place of ``make_lane``."""
    lane = LateLane(name, device)
    lane.delay_s = 0.0005 if name == "read" else 0.005  # reads overtake writes where nothing holds them back
    return lane


def train(weights, rule="lomo", dtype=torch.float32, num_steps=10, family="llama", model=None, changes=None, **options):
    """Ten steps on ten batches; returns (model, its home, its norms), the model an ordinary one again."""
    model = model or tiny_model(family, dtype=dtype, **(changes or {}))
    optimizer = RULES[rule](model.parameters())
    engine = lowtide.fuse(model, optimizer, weights=weights, **options)
    norms = []
    for step in range(num_steps):
        loss = model(**tiny_batch(step)).loss
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        norms.append(engine.grad_norm)
    engine.remove()
    return model, engine.home, norms


def make_late(monkeypatch):
    """All copies of streamed homes land late."""
    monkeypatch.setattr(streamed, "make_lane", late_lane)
