"""What the ranks of a :class:`RankPool` run; everything that comes and goes can be pickled."""

import torch
from torch import nn

import lowtide
from helpers import tiny_batch, tiny_model

RULES = {
    "lomo": lambda params: lowtide.Lomo(params, lr=0.05, weight_decay=0.1),
    "adalomo": lambda params: lowtide.AdaLomo(params, lr=5e-3, weight_decay=0.1),
    "adamw": lambda params: lowtide.PerParameter(torch.optim.AdamW, params, lr=1e-3),
}


def own_rows(batch, rank, size):
    """This rank's part of a batch: rows one after the other, the last ranks with fewer."""
    count = next(iter(batch.values())).shape[0]
    chunk = -(-count // size)
    return {name: value[rank * chunk : (rank + 1) * chunk] for name, value in batch.items()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(model):
    return {name: whole(param.detach()).float().clone() for name, param in model.named_parameters()}


def freeze(model):
    model.model.layers[1].requires_grad_(False)
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)


def train(rule, family="llama", num_steps=5, frozen=False, model_changes=None, shard=None, fuse=None, dtype=torch.float32):
    """Some steps on all ranks together, or in one process; returns weights, losses and norms."""
    distributed = torch.distributed.is_initialized()
    rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    model = tiny_model(family, dtype, **(model_changes or {}))
    if frozen:
        freeze(model)
    if distributed:
        lowtide.shard(model, **(shard or {}))
    optimizer = RULES[rule]([param for param in model.parameters() if param.requires_grad])
    engine = lowtide.fuse(model, optimizer, **(fuse or {}))
    losses, norms = [], []
    for step in range(num_steps):
        loss = model(**own_rows(tiny_batch(step), rank, size)).loss
        engine.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        norms.append(engine.grad_norm)
    engine.remove()
    return {"weights": weights(model), "losses": losses, "norms": norms}
