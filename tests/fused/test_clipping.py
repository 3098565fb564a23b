"""Two-pass clipping, what is kept between its passes, one-pass clipping, and gradients that are not finite."""

import math

import pytest
import torch
from torch import nn

import lowtide
from helpers import TOLERANCE, Snapshot, dropout_model, largest_difference, same_weights, tiny_batch, tiny_model
from lowtide.fused.clipping import AdaptiveClip


def reference_step(model, sgd, batch, max_norm):
    model(**batch).loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    sgd.step()
    sgd.zero_grad()
    return norm


@pytest.mark.parametrize("clip_memory_bytes", [0, 30_000, 10**9], ids=["twice", "partly kept", "all kept"])
@pytest.mark.parametrize("blocks", [None, []], ids=["blocks", "hooks alone"])
def test_exact_clipping_with_dropout_and_tied_weights_is_torchs(blocks, clip_memory_bytes):
    """The same random numbers in the forward, the measuring and the updating pass."""
    reference, model = dropout_model(), dropout_model()
    sgd = torch.optim.SGD(reference.parameters(), lr=0.1)
    lomo = lowtide.Lomo(model.parameters(), lr=0.1)
    engine = lowtide.fuse(
        model, lomo, clip_grad_norm=0.3, clip_memory_bytes=clip_memory_bytes, blocks=blocks, chunked_loss=False
    )
    for step in range(4):
        torch.manual_seed(step)
        norm = reference_step(reference, sgd, tiny_batch(step), 0.3)
        torch.manual_seed(step)
        engine.backward(model(**tiny_batch(step)).loss)
        lomo.step()
        assert norm > 0.3 and engine.grad_norm == pytest.approx(norm, rel=1e-5)
    assert largest_difference(reference, model) < TOLERANCE[torch.float32]


def clipped_run(rule, *, micro_batch_size, clip_memory_bytes, tied=True, dtype=torch.float32):
    model = tiny_model(tie_word_embeddings=tied, dtype=dtype)
    optimizer = rule(model.parameters(), lr=0.05)
    engine = lowtide.fuse(
        model,
        optimizer,
        clip_grad_norm=0.2,
        micro_batch_size=micro_batch_size,
        clip_memory_bytes=clip_memory_bytes,
        vocabulary_slices=False,  # which are there without clip_memory_bytes only, and are added up in another order
    )
    norms = []
    for step in range(4):
        engine.backward(model(**tiny_batch(step)).loss)
        optimizer.step()
        norms.append(engine.grad_norm)
    return model, norms


@pytest.mark.parametrize("rule", [lowtide.Lomo, lowtide.AdaLomo])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_between_the_passes_changes_nothing(rule, tied, micro_batch_size, dtype):
    options = {"micro_batch_size": micro_batch_size, "tied": tied, "dtype": dtype}
    model, norms = clipped_run(rule, clip_memory_bytes=0, **options)
    for budget in (1, 20_000, 60_000, 10**9):
        kept, kept_norms = clipped_run(rule, clip_memory_bytes=budget, **options)
        assert norms == kept_norms
        assert same_weights(model, kept), budget


def test_what_is_kept_stays_within_the_budget_and_saves_recomputing():
    """Blocks run once in the forward, once more in the measuring pass, and in the second only if they were not kept."""
    counts = {}
    grad_bytes = sum(p.numel() * 4 for p in tiny_model(num_hidden_layers=6).model.layers[0].parameters())
    for blocks_kept in (0, 2, 6):
        model = tiny_model(num_hidden_layers=6, tie_word_embeddings=False)
        embedding_bytes = model.model.embed_tokens.weight.numel() * 4
        budget = blocks_kept * grad_bytes + embedding_bytes if blocks_kept else 0
        calls = []
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        optimizer = lowtide.Lomo(model.parameters())
        engine = lowtide.fuse(model, optimizer, clip_grad_norm=0.1, clip_memory_bytes=budget)
        loss = model(**tiny_batch()).loss
        held = []
        original = engine.measure

        def watch(slot, grad, original=original, engine=engine, held=held):
            original(slot, grad)
            if engine._kept is not None:
                held.append(sum(kept.numel() * 4 for kept in engine._kept._grads.values()))

        engine.measure = watch
        engine.backward(loss)
        counts[blocks_kept] = len(calls)
        assert max(held, default=0) <= budget
    assert counts == {0: 18, 2: 16, 6: 12}


@pytest.mark.parametrize("clip_memory_bytes", [0, 10**9])
def test_a_loss_spike_is_clipped(clip_memory_bytes):
    model = tiny_model()
    optimizer = lowtide.Lomo(model.parameters(), lr=1.0)
    engine = lowtide.fuse(model, optimizer, clip_grad_norm=0.01, clip_memory_bytes=clip_memory_bytes)
    before = Snapshot(model)
    engine.backward(model(**tiny_batch()).loss * 1e6)
    moved = math.sqrt(
        sum(((p - b) ** 2).sum().item() for p, b in zip(model.parameters(), before.parameters(), strict=True))
    )
    assert engine.grad_norm > 1e4 and moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("clip_memory_bytes", [0, 10**9])
def test_nan_in_one_late_layer_leaves_every_weight_alone(clip_memory_bytes):
    """Late in the backward pass: the first block, when the others could have been updated already."""
    model = tiny_model()
    optimizer = lowtide.AdaLomo(model.parameters())
    engine = lowtide.fuse(model, optimizer, clip_grad_norm=1.0, clip_memory_bytes=clip_memory_bytes)
    broken = model.model.layers[0].self_attn.q_proj.weight
    handle = broken.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), math.nan))
    before = Snapshot(model)
    engine.backward(model(**tiny_batch()).loss)
    optimizer.step()
    assert engine.step_skipped and not engine.step_partial and engine.num_skipped_steps == 1
    assert same_weights(before, model) and not optimizer.state
    handle.remove()
    engine.backward(model(**tiny_batch()).loss)
    assert not engine.step_skipped and not same_weights(before, model)


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 1.0}], ids=["one pass", "two passes"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_followed_back(bad, options, caplog):
    """Nothing is computed: no layer is asked for its gradient."""
    model = tiny_model()
    optimizer = lowtide.Lomo(model.parameters(), lr=0.1)
    engine = lowtide.fuse(model, optimizer, **options)
    before, reached = Snapshot(model), []
    hidden = model.model.norm.register_full_backward_hook(lambda *_: reached.append(1))
    engine.backward(model(**tiny_batch()).loss * bad)
    optimizer.step()
    assert engine.step_skipped and engine.num_skipped_steps == 1 and math.isnan(engine.grad_norm)
    assert not reached and same_weights(before, model)
    assert f"the loss is {bad}" in caplog.text
    hidden.remove()


def test_a_bare_backward_stops_at_a_loss_that_is_not_finite(caplog):
    model = tiny_model()
    optimizer = lowtide.Lomo(model.parameters(), lr=0.1)
    engine = lowtide.fuse(model, optimizer)
    before = Snapshot(model)
    (model(**tiny_batch()).loss * math.nan).backward()
    optimizer.step()
    assert engine.step_skipped and not engine.step_partial and same_weights(before, model)
    assert "the gradient of the loss is not finite" in caplog.text


@pytest.mark.parametrize("clip", ["exact", "adaptive"])
def test_gradients_are_not_looked_at_one_by_one_on_an_accelerator(clip):
    """The same on the path that a GPU takes: a flag on the device turns what follows into nothing."""
    model = tiny_model()
    optimizer = lowtide.Lomo(model.parameters(), lr=0.1)
    options = {"clip_grad_norm": 1.0, "clip": "adaptive", "clip_warmup_steps": 1} if clip == "adaptive" else {}
    engine = lowtide.fuse(model, optimizer, **options)
    engine._reads_norms = False
    engine.backward(model(**tiny_batch()).loss)
    optimizer.step()
    before = Snapshot(model)
    handle = model.model.layers[1].mlp.up_proj.weight.register_hook(lambda grad: grad * math.nan)
    engine.backward(model(**tiny_batch(1)).loss)
    optimizer.step()
    assert engine.step_partial and not engine.step_skipped
    assert all(torch.isfinite(p).all() for p in model.parameters())
    first, last = model.model.layers[0].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight
    names = [name for name, _ in model.named_parameters()]
    kept = dict(zip(names, before.parameters(), strict=True))
    assert torch.equal(first, kept["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(last, kept["model.layers.2.mlp.up_proj.weight"])
    handle.remove()
    engine.backward(model(**tiny_batch(2)).loss)
    optimizer.step()
    assert not engine.step_partial and math.isfinite(engine.grad_norm)
    assert not torch.equal(first, kept["model.layers.0.mlp.up_proj.weight"])


def test_a_torch_optimizer_does_not_move_by_its_momentum_there():
    """It is told on the host, as it would use a gradient of zeros, and count a step."""
    model = tiny_model()
    optimizer = lowtide.PerParameter(torch.optim.AdamW, model.parameters(), lr=0.01, weight_decay=0.1)
    engine = lowtide.fuse(model, optimizer)
    engine._reads_norms = False
    engine.backward(model(**tiny_batch()).loss)
    optimizer.step()
    before = Snapshot(model)
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda grad: grad * math.nan)
    engine.backward(model(**tiny_batch(1)).loss)
    optimizer.step()
    assert engine.step_partial and not engine.step_skipped
    names = [name for name, _ in model.named_parameters()]
    kept = dict(zip(names, before.parameters(), strict=True))
    for name, param in model.named_parameters():
        changed = name.startswith(("model.layers.2.", "model.norm"))
        in_the_same_layer = name.startswith("model.layers.1.")  # some come before it
        assert in_the_same_layer or (changed != torch.equal(param, kept[name])), name
        assert in_the_same_layer or optimizer.state[param]["step"] == (2 if changed else 1), name
    broken = model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(broken, kept["model.layers.1.mlp.up_proj.weight"]) and optimizer.state[broken]["step"] == 1


def test_both_paths_give_the_same_weights():
    models = []
    for reads in (True, False):
        model = tiny_model()
        optimizer = lowtide.Lomo(model.parameters(), lr=0.1)
        engine = lowtide.fuse(model, optimizer, clip_grad_norm=0.5, clip="adaptive", clip_warmup_steps=2)
        engine._reads_norms = reads
        for step in range(6):
            engine.backward(model(**tiny_batch(step)).loss)
            optimizer.step()
        models.append(model)
    assert largest_difference(*models) < TOLERANCE[torch.float32]


def slow_adagc(norms, max_norm, warmup_steps, ratio=1.05, decay=0.98):
    """AdaGC (arXiv 2502.11034) as written there: norms[t][i] in, coefficients[t][i] out."""
    running, coefficients = [math.inf] * len(norms[0]), []
    for step, row in enumerate(norms):
        if step < warmup_steps:
            total = math.sqrt(sum(norm**2 for norm in row))
            row_out = [min(1.0, max_norm / (total + 1e-6))] * len(row)
            running = [min(r, norm * c) for r, norm, c in zip(running, row, row_out, strict=True)]
        else:
            row_out = [min(1.0, ratio * r / norm) for r, norm in zip(running, row, strict=True)]
            running = [decay * r + (1 - decay) * norm * c for r, norm, c in zip(running, row, row_out, strict=True)]
        coefficients.append(row_out)
    return coefficients


def test_adaptive_clipping_is_adagc():
    torch.manual_seed(0)
    norms = (torch.rand(12, 3) * torch.tensor([0.1, 1.0, 10.0])).tolist()
    norms[8][1] *= 100  # a spike
    params = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    clip, found = AdaptiveClip(warmup_steps=4), []
    for row in norms:
        tensors = [torch.tensor(norm) for norm in row]
        if clip.warming_up:
            for param, norm in zip(params, tensors, strict=True):
                clip.measured(param, norm)
            total = math.sqrt(sum(norm**2 for norm in row))
            found.append([min(1.0, 1.0 / (total + 1e-6))] * 3)
            clip.warm_up(found[-1][0])
        else:
            found.append([clip.coefficient(p, norm).item() for p, norm in zip(params, tensors, strict=True)])
    expected = slow_adagc(norms, 1.0, 4)
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-5)
    assert found[8][1] < 0.05


def test_adaptive_clipping_starts_with_the_first_gradient_that_is_not_zero():
    param, clip = nn.Parameter(torch.zeros(1)), AdaptiveClip(warmup_steps=1)
    clip.measured(param, torch.tensor(0.0))
    clip.warm_up(1.0)
    assert clip.coefficient(param, torch.tensor(0.0)).item() == 1.0
    assert clip.coefficient(param, torch.tensor(2.0)).item() == 1.0
    assert clip.coefficient(param, torch.tensor(4.0)).item() == pytest.approx(1.05 / 2)
    clip.coefficient(param, torch.tensor(math.nan))  # does not count
    assert clip.coefficient(param, torch.tensor(2.0)).item() == pytest.approx(1.0)


def test_adaptive_clipping_walks_the_graph_once_after_its_warm_up():
    model = tiny_model()
    optimizer = lowtide.Lomo(model.parameters(), lr=0.1)
    engine = lowtide.fuse(model, optimizer, clip_grad_norm=0.5, clip="adaptive", clip_warmup_steps=2)
    calls = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    for step in range(4):
        engine.backward(model(**tiny_batch(step)).loss)
        optimizer.step()
    assert len(calls) == 2 * 3 + 2 * 2
    spike = Snapshot(model)
    engine.backward(model(**tiny_batch(5)).loss * 1e5)
    moved = math.sqrt(
        sum(((p - b) ** 2).sum().item() for p, b in zip(model.parameters(), spike.parameters(), strict=True))
    )
    assert engine.grad_norm > 1e3 and moved < 0.1 * 0.5 * 1.1


def test_the_engines_state_continues_a_run_bit_for_bit():
    def start():
        model = tiny_model(dtype=torch.bfloat16)
        optimizer = lowtide.Lomo(model.parameters(), lr=0.1, rounding="compensated")
        options = {"clip_grad_norm": 0.5, "clip": "adaptive", "clip_warmup_steps": 3}
        return (
            model,
            optimizer,
            lowtide.fuse(model, optimizer, loss_scale=lowtide.LossScale(growth_interval=2), **options),
        )

    def run(model, optimizer, engine, steps):
        for step in steps:
            engine.backward(model(**tiny_batch(step)).loss)
            optimizer.step()

    whole = start()
    run(*whole, range(8))
    for cut in (2, 5):
        first, second = start(), start()
        run(*first, range(cut))
        second[0].load_state_dict(first[0].state_dict())
        second[1].load_state_dict(first[1].state_dict())
        second[2].load_state_dict(first[2].state_dict())
        run(*second, range(cut, 8))
        assert same_weights(whole[0], second[0])
        assert second[2].loss_scale.scale == whole[2].loss_scale.scale > 2.0**16
    with pytest.raises(ValueError, match="does not train"):
        whole[2].load_state_dict(
            {"num_skipped_steps": 0, "adaptive": {"num_warmup_steps": 1, "running_norms": {"x": 1.0}}}
        )
