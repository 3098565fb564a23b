"""What the ranks of a :class:`RankPool` run; everything that comes and goes can be pickled."""

import collections

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowtide
from helpers import tiny_batch, tiny_model

RULES = {
    "lomo": lambda params: lowtide.Lomo(params, lr=0.05, weight_decay=0.1),
    "adalomo": lambda params: lowtide.AdaLomo(params, lr=5e-3, weight_decay=0.1),
    # With the usual eps of 1e-8 an element whose gradient is rounding noise is moved by the whole rate.
    "adamw": lambda params: lowtide.PerParameter(torch.optim.AdamW, params, lr=3e-4, eps=1e-6),
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


def train(
    rule,
    family="llama",
    num_steps=5,
    frozen=False,
    padded=True,
    model_changes=None,
    shard=None,
    fuse=None,
    dtype=torch.float32,
):
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
        loss = model(**own_rows(tiny_batch(step, padded=padded), rank, size)).loss
        engine.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        norms.append(engine.grad_norm)
    engine.remove()
    return {"weights": weights(model), "losses": losses, "norms": norms}


class Plain(nn.Module):
    """Parameters whose rows do not divide by the number of ranks, fewer than there are ranks in one case."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        shapes = {"matrix": (7, 13), "vector": (9,), "experts": (3, 5, 4), "row": (1, 6)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).to(torch.bfloat16)))


def update(rule, rounding, num_steps=4):
    """Steps of an optimizer on gradients that are the same whoever holds them."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    model = Plain()
    if torch.distributed.is_initialized():
        fully_shard(model)
    make = {
        "lomo": lambda: lowtide.Lomo(model.parameters(), lr=1e-3, rounding=rounding),
        "adalomo": lambda: lowtide.AdaLomo(model.parameters(), lr=1e-3, rounding=rounding),
        "adamw": lambda: lowtide.PerParameter(torch.optim.AdamW, model.parameters(), lr=1e-4, rounding=rounding),
    }
    optimizer = make[rule]()
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            is_sharded = hasattr(param, "device_mesh")
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if is_sharded else grad
        optimizer.step()
    return weights(model)


class Counting(TorchDispatchMode):
    """Counts calls of process groups by their names."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.counts[function._schema.name.partition("::")[2]] += 1
        return function(*args, **(kwargs or {}))


def count_collectives(num_steps=1, **options):
    """By name, the collective calls of a step after the first; and the number of blocks."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = tiny_model(**options.pop("model_changes", {}))
    rule = options.pop("rule", "lomo")
    lowtide.shard(model)
    optimizer = RULES[rule](model.parameters())
    engine = lowtide.fuse(model, optimizer, **options)
    counted = {}
    for step in range(1 + num_steps):
        with Counting() as counting:
            engine.backward(model(**own_rows(tiny_batch(step), rank, size)).loss)
            optimizer.step()
        counted = dict(counting.counts)
    engine.remove()
    return counted


class Breaks(torch.autograd.Function):
    """Passes a tensor on, and sends back what is not finite."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, torch.inf)


def broken_gradient(where, rule="lomo", **options):
    """A step in which one rank sends back an infinite gradient, in front of a block or in the loss; then an ordinary one."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = tiny_model()
    lowtide.shard(model)
    optimizer = RULES[rule](model.parameters())
    engine = lowtide.fuse(model, optimizer, **options)
    before = weights(model)
    broken = rank == size - 1

    def break_input(module, args):
        return (Breaks.apply(args[0]), *args[1:]) if broken and torch.is_grad_enabled() else None

    handle = None
    if where != "loss":
        handle = model.model.layers[where].register_forward_pre_hook(break_input)
    batch = own_rows(tiny_batch(0), rank, size)
    loss = model(**batch).loss
    if where == "loss" and broken:
        loss = loss * torch.inf
    engine.backward(loss)
    optimizer.step()
    state = {"skipped": engine.step_skipped, "partial": engine.step_partial, "norm": engine.grad_norm}
    after = weights(model)
    state["changed"] = [name for name, value in before.items() if not torch.equal(value, after[name])]
    if handle is not None:
        handle.remove()
    loss = model(**own_rows(tiny_batch(1), rank, size)).loss
    engine.backward(loss)
    optimizer.step()
    state["next"] = (loss.item(), engine.grad_norm, engine.step_skipped)
    state["weights"] = weights(model)
    engine.remove()
    return state


def refused(what):
    """The message of a refusal."""
    model = tiny_model()
    try:
        if what == "not sharded":
            lowtide.fuse(model, lowtide.Lomo(model.parameters()))
        elif what == "optimizer too early":
            optimizer = lowtide.Lomo(model.parameters())
            lowtide.fuse(lowtide.shard(model), optimizer)
        elif what == "twice":
            lowtide.shard(lowtide.shard(model))
        elif what == "groups":
            lowtide.shard(model, ranks_per_node=3)
        elif what == "home":
            lowtide.shard(model)
            lowtide.fuse(model, lowtide.Lomo(model.parameters()), weights="./somewhere")
        elif what == "some processes":
            from torch.distributed.device_mesh import DeviceMesh

            lowtide.shard(model, DeviceMesh("cpu", [torch.distributed.get_rank()]))
        elif what == "dtypes":
            model.model.layers[1].input_layernorm.to(torch.float64)
            lowtide.shard(model)
        elif what == "columns":
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor import Shard

            fully_shard(model, shard_placement_fn=lambda param: Shard(param.dim() - 1))
            lowtide.fuse(model, lowtide.Lomo(model.parameters()))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def train_run(settings, stop_after=None):
    """``lowtide train`` on all ranks; returns what came of it."""
    import signal

    from lowtide.training import TrainConfig, train

    def interrupt(event):
        if event["event"] == "train" and event["step"] == stop_after:
            signal.raise_signal(signal.SIGINT)

    result = train(TrainConfig(**settings), on_event=interrupt, show_progress=False)
    return {
        "steps": result.num_steps,
        "before": result.loss_before and result.loss_before.loss,
        "after": result.loss_after and result.loss_after.loss,
        "interrupted": result.interrupted,
        "model": str(result.model_dir),
    }


def train_with_own_loss(settings):
    """A model whose head is not understood, so that it computes its own loss."""
    from unittest import mock

    from lowtide.models import ChunkedLoss

    with mock.patch.object(ChunkedLoss, "of", classmethod(lambda cls, model: None)):
        return train_run(settings)


def train_with_full_disk(settings):
    """The first checkpoint meets a full disk after its first tensor."""
    from unittest import mock

    from lowtide.models import shards

    original, calls = shards.write_file, []

    def write_file(path, entries, tensors):
        calls.append(path)
        if len(calls) == 1:
            next(iter(tensors))
            raise OSError(28, "No space left on device")
        return original(path, entries, tensors)

    with mock.patch.object(shards, "write_file", write_file):
        return train_run(settings)


def overflow(dtype=torch.float16):
    """A float16 step whose scaled gradients overflow on the last rank alone, and two that do not."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = tiny_model(dtype=dtype)
    lowtide.shard(model)
    optimizer = lowtide.Lomo(model.parameters(), lr=1e-2)
    engine = lowtide.fuse(model, optimizer, micro_batch_size=1, loss_scale=lowtide.LossScale(2.0**10))
    scales, skipped = [], []
    for step in range(3):
        loss = model(**own_rows(tiny_batch(step), rank, size)).loss
        if step == 0 and rank == size - 1:
            loss = loss * 3e4
        engine.backward(loss)
        optimizer.step()
        scales.append(engine.loss_scale.scale)
        skipped.append(engine.step_skipped or engine.step_partial)
    engine.remove()
    return {"scales": scales, "skipped": skipped, "weights": weights(model)}


def dtypes_of_sums(reduce_dtype):
    """In which gradients wait behind a micro-batch that is not the last; None where they stay where autograd has put them."""
    from lowtide.fused.sharded import UnshardedSums

    found, original = [], UnshardedSums.add

    def add(sums):
        original(sums)
        kept = [param.unsharded_accumulated_grad for param in sums._params]
        found.extend(None if grad is None else grad.dtype for grad in kept)

    UnshardedSums.add = add
    try:
        train(
            "lomo",
            dtype=torch.bfloat16,
            num_steps=1,
            shard={"reduce_dtype": reduce_dtype},
            fuse={"micro_batch_size": 1},
        )
    finally:
        UnshardedSums.add = original
    return found


def evaluate_sharded():
    """Held-out loss of a sharded model that was never run, and of a batch without anything to count; then a step of training."""
    from lowtide.evaluation import evaluate_loss
    from lowtide.ranks import Ranks

    ranks = Ranks()
    model = tiny_model()
    lowtide.shard(model)
    nothing = {name: value.clone() for name, value in tiny_batch(0).items()}
    nothing["labels"].fill_(-100)
    alike = evaluate_loss(model, [tiny_batch(1), nothing]).loss
    shared = evaluate_loss(model, [own_rows(tiny_batch(1), ranks.rank, ranks.size)], ranks).loss
    optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
    engine = lowtide.fuse(model, optimizer)
    engine.backward(model(**own_rows(tiny_batch(0), ranks.rank, ranks.size)).loss)
    optimizer.step()
    return alike, shared


def train_with_other_settings(settings, by_rank):
    """Each rank has a setting of its own."""
    rank = torch.distributed.get_rank()
    return train_run({**settings, **by_rank[rank]})


def stopped_late(settings, when):
    """A signal that reaches one rank alone, at a bad moment."""
    import signal
    from unittest import mock

    from lowtide.training.run import Run

    rank = torch.distributed.get_rank()
    original_sum, original_evaluate, count = Run.asked, Run.evaluate, [0]

    def asked(run, save_is_due=False):
        answer = original_sum(run, save_is_due)
        if when == "after the ranks have agreed" and rank == 1 and run.report.num_steps == 2 and not count[0]:
            count[0] = 1
            signal.raise_signal(signal.SIGTERM)
        return answer

    def evaluate(run):
        if when == "in the last evaluation" and rank == 1 and run.report.num_steps == run.num_steps:
            signal.raise_signal(signal.SIGTERM)
        return original_evaluate(run)

    with mock.patch.object(Run, "asked", asked), mock.patch.object(Run, "evaluate", evaluate):
        found = train_run(settings)
    if when == "after the ranks have agreed" and rank == 0:
        assert found["interrupted"]
    return found
