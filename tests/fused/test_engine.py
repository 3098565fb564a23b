"""What is alive when, the order of calls, and everything that is refused."""

import logging
import weakref
from collections import UserDict

import pytest
import torch
from torch import nn

import lowtide
from helpers import Snapshot, same_weights, tiny_batch, tiny_model, twin


class Watcher:
    """Counts gradients that are alive, from inside the update of every parameter."""

    def __init__(self, model, optimizer, engine):
        self.model, self.engine, self.most_params, self.blocks_seen = model, engine, 0, 0
        block_of = {}
        for index, layer in enumerate(model.model.layers):
            block_of.update(dict.fromkeys(layer.parameters(), index))
        original = optimizer.update_param

        def watched(param, grad, group, prepare=None):
            alive = {p for p in model.parameters() if p.grad is not None}
            alive |= {slot.param for slot in engine._slots.values() if slot.total is not None}
            alive.add(param)
            self.most_params = max(self.most_params, len(alive))
            self.blocks_seen = max(self.blocks_seen, len({block_of.get(p, -1) for p in alive}))
            original(param, grad, group, prepare)

        optimizer.update_param = watched


@pytest.mark.parametrize("tied", [True, False])
def test_one_gradient_is_alive_at_a_time(tied):
    model = tiny_model(tie_word_embeddings=tied)
    optimizer = lowtide.Lomo(model.parameters())
    engine = lowtide.fuse(model, optimizer)
    watcher = Watcher(model, optimizer, engine)
    engine.backward(model(**tiny_batch()).loss)
    assert watcher.most_params == 1


def test_gradients_of_one_block_are_alive_with_micro_batches():
    model = tiny_model()
    optimizer = lowtide.Lomo(model.parameters())
    engine = lowtide.fuse(model, optimizer, micro_batch_size=2)
    watcher = Watcher(model, optimizer, engine)
    engine.backward(model(**tiny_batch()).loss)
    in_a_block = len(list(model.model.layers[0].parameters()))
    assert watcher.blocks_seen == 1
    assert 1 < watcher.most_params <= in_a_block
    assert all(p.grad is None for p in model.parameters())
    assert all(slot.total is None for slot in engine._slots.values())


def test_only_block_inputs_are_kept_for_the_backward():
    """Bytes that autograd saves between the passes: one hidden state a block, not its activations."""
    saved = {}
    for fused in (False, True):
        model = tiny_model(num_hidden_layers=6)
        if fused:
            lowtide.fuse(model, lowtide.Lomo(model.parameters()))
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**tiny_batch()).loss
        saved[fused] = sum(size for pointer, size in storages.items() if pointer not in parameters)
        assert loss.requires_grad
    assert saved[True] < 0.2 * saved[False]


def test_kept_inputs_die_with_the_backward_though_the_loss_lives_on():
    model = tiny_model()
    engine = lowtide.fuse(model, lowtide.Lomo(model.parameters()))
    inputs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    loss = model(**tiny_batch()).loss
    assert len(inputs) == 3 and all(reference() is not None for reference in inputs)
    engine.backward(loss)
    assert loss.item() > 0 and all(reference() is None for reference in inputs)


def setup(**options):
    model = tiny_model()
    optimizer = lowtide.Lomo(model.parameters(), lr=0.1)
    return model, optimizer, lowtide.fuse(model, optimizer, **options)


@pytest.mark.parametrize("plain_backward", [False, True])
@pytest.mark.parametrize("blocks", [None, []])
def test_second_backward_before_step_is_refused(plain_backward, blocks):
    model, optimizer, engine = setup(blocks=blocks)

    def backward():
        loss = model(**tiny_batch()).loss
        loss.backward() if plain_backward else engine.backward(loss)

    backward()
    after_first = Snapshot(model)
    with pytest.raises(RuntimeError, match="micro_batch_size"):
        backward()
    assert same_weights(after_first, model)
    optimizer.step()
    backward()
    assert not same_weights(after_first, model)


def test_every_optimizer_must_close_the_step():
    model = tiny_model()
    head = list(model.lm_head.parameters())
    ids = {id(p) for p in head}
    first = lowtide.AdaLomo(head, lr=1e-3)
    second = lowtide.Lomo([p for p in model.parameters() if id(p) not in ids], lr=0.1)
    engine = lowtide.fuse(model, [first, second])
    before = Snapshot(model)
    engine.backward(model(**tiny_batch()).loss)
    assert not any(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))
    first.step()
    with pytest.raises(RuntimeError, match="Lomo"):
        engine.backward(model(**tiny_batch()).loss)
    second.step()
    engine.backward(model(**tiny_batch()).loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("plain_backward", [False, True])
@pytest.mark.parametrize("blocks", [None, []])
def test_non_finite_loss_updates_nothing(value, plain_backward, blocks, caplog):
    model, optimizer, engine = setup(blocks=blocks)
    before = Snapshot(model)
    loss = model(**tiny_batch()).loss * value
    with caplog.at_level(logging.WARNING):
        loss.backward() if plain_backward else engine.backward(loss)
    assert engine.step_skipped and engine.num_skipped_steps == 1 and "skipped" in caplog.text
    assert same_weights(before, model) and all(p.grad is None for p in model.parameters())
    optimizer.step()
    engine.backward(model(**tiny_batch()).loss)
    assert not engine.step_skipped and not same_weights(before, model)


def test_non_finite_norm_skips_before_any_weight_changes():
    model, optimizer, engine = setup(clip_grad_norm=1.0)
    before = Snapshot(model)
    poison = model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * float("nan"))
    engine.backward(model(**tiny_batch()).loss)  # the poisoned gradient arrives last of all but the embedding's
    assert engine.step_skipped and same_weights(before, model)
    optimizer.step()
    poison.remove()
    engine.backward(model(**tiny_batch()).loss)
    assert not engine.step_skipped and not same_weights(before, model)


def test_a_backward_that_broke_off_is_reported():
    model, optimizer, engine = setup()
    bomb = model.model.layers[1].register_full_backward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("boom")))
    with pytest.raises(OSError, match="boom"):
        engine.backward(model(**tiny_batch()).loss)
    bomb.remove()
    with pytest.raises(RuntimeError, match="broken off"):
        engine.backward(model(**tiny_batch()).loss)
    optimizer.step()  # go on with the weights as they are
    engine.backward(model(**tiny_batch()).loss)
    assert all(p.grad is None for p in model.parameters())


def test_forward_passes_that_are_thrown_away_do_no_harm():
    model, optimizer, engine = setup(micro_batch_size=2)
    for _ in range(3):
        model(**tiny_batch())
    watcher = Watcher(model, optimizer, engine)
    engine.backward(model(**tiny_batch()).loss)
    assert watcher.blocks_seen == 1
    kept = model(**tiny_batch(1)).loss  # alive: until the step is closed its blocks might still get gradients
    optimizer.step()
    assert kept.requires_grad and not any(slot.shared and not slot.always_shared for slot in engine._slots.values())
    engine.backward(model(**tiny_batch()).loss)
    assert watcher.blocks_seen == 1


def test_two_forward_passes_in_one_loss_are_one_step():
    model, _, engine = setup()
    other = tiny_model()
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    engine.backward(model(**tiny_batch(0)).loss + model(**tiny_batch(1)).loss)
    (other(**tiny_batch(0)).loss + other(**tiny_batch(1)).loss).backward()
    sgd.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_remove_gives_an_ordinary_model_back():
    model, optimizer, engine = setup()
    engine.remove()
    engine.remove()
    before = Snapshot(model)
    model(**tiny_batch()).loss.backward()
    assert same_weights(before, model) and all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert not same_weights(before, model)
    optimizer.zero_grad()
    lowtide.fuse(model, optimizer).remove()


def test_load_state_dict_after_fuse_is_followed():
    """torch replaces the group dictionaries on loading; the hooks must read the new ones."""
    model, optimizer, engine = setup()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.0
    optimizer.load_state_dict(state)
    before = Snapshot(model)
    engine.backward(model(**tiny_batch()).loss)
    assert same_weights(before, model)


def test_misuse_is_refused_with_advice():
    model = tiny_model()
    with pytest.raises(TypeError, match="PerParameter"):
        lowtide.fuse(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"in no optimizer: model\.layers"):
        lowtide.fuse(model, lowtide.Lomo(model.model.embed_tokens.parameters()))
    optimizer = lowtide.Lomo(model.parameters())
    with pytest.raises(ValueError, match="two optimizers"):
        lowtide.fuse(model, [optimizer, lowtide.Lomo(model.lm_head.parameters())])
    with pytest.raises(ValueError, match="micro_batch_size needs blocks"):
        lowtide.fuse(model, optimizer, blocks=[], micro_batch_size=2)
    with pytest.raises(ValueError, match=r"did you mean 'model\.layers'"):
        lowtide.fuse(model, optimizer, blocks=["model.layer"])
    with pytest.raises(ValueError, match="overlap"):
        lowtide.fuse(model, optimizer, blocks=["model.layers", model.model.layers[0].mlp])
    with pytest.raises(ValueError, match="clip_grad_value must be positive"):
        lowtide.fuse(model, optimizer, clip_grad_value=-1.0)
    with pytest.raises(ValueError, match="weights='tape'"):
        lowtide.fuse(model, optimizer, weights="tape")
    with pytest.raises(ValueError, match="float16"):
        half = tiny_model(dtype=torch.float16)
        lowtide.fuse(half, lowtide.Lomo(half.parameters()), loss_scale=None)
    with pytest.raises(ValueError, match="loss_scale must be auto"):
        lowtide.fuse(model, optimizer, loss_scale="big")
    with pytest.raises(ValueError, match="clip must be exact or adaptive"):
        lowtide.fuse(model, optimizer, clip_grad_norm=1.0, clip="smart")
    with pytest.raises(ValueError, match="needs clip_grad_norm"):
        lowtide.fuse(model, optimizer, clip="adaptive")
    with pytest.raises(ValueError, match="DataParallel"):
        lowtide.fuse(nn.DataParallel(model), optimizer)
    with pytest.raises(ValueError, match="router"):
        moe = tiny_model("qwen3_moe", output_router_logits=True)
        lowtide.fuse(moe, lowtide.Lomo(moe.parameters()))
    with pytest.raises(ValueError, match="sparse"):
        sparse = nn.Embedding(4, 4, sparse=True)
        lowtide.fuse(sparse, lowtide.Lomo(sparse.parameters()))
    with pytest.raises(ValueError, match="batch norm"):
        norm = nn.Sequential(nn.BatchNorm1d(4))
        lowtide.fuse(norm, lowtide.Lomo(norm.parameters()), blocks=["0"])
    model(**tiny_batch()).loss.backward()
    with pytest.raises(ValueError, match="zero_grad"):
        lowtide.fuse(model, optimizer)
    optimizer.zero_grad()
    lowtide.fuse(model, optimizer)
    with pytest.raises(RuntimeError, match="already"):
        lowtide.fuse(model, lowtide.Lomo(model.parameters()))


def test_several_processes_are_refused_whatever_the_order_of_wrapping(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = tiny_model()
    with pytest.raises(ValueError, match="2 processes"):
        lowtide.fuse(model, lowtide.Lomo(model.parameters()))


def test_ddp_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(tiny_model())
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            lowtide.fuse(model, lowtide.Lomo(model.parameters()))
    finally:
        torch.distributed.destroy_process_group()


def test_losses_that_cannot_be_used_are_refused():
    model, optimizer, engine = setup()
    before = Snapshot(model)
    with torch.no_grad():
        loss = model(**tiny_batch()).loss
    with pytest.raises(RuntimeError, match="no graph"):
        engine.backward(loss)
    with pytest.raises(ValueError, match="single number"):
        engine.backward(model.lm_head.weight.sum(dim=0))
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="GradScaler"):
        engine.backward(scaler.scale(model(**tiny_batch()).loss))
    assert same_weights(before, model)
    engine.backward(model(**tiny_batch()).loss * 2.0)  # an ordinary factor is no scaler
    scaler.scale(torch.ones(1))
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)


def test_plain_backward_with_two_pass_clipping_is_refused():
    model, _, _ = setup(clip_grad_norm=1.0)
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match=r"engine\.backward"):
        model(**tiny_batch()).loss.backward()
    assert same_weights(before, model)


def test_checkpointing_is_refused():
    model = tiny_model()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        lowtide.fuse(model, lowtide.Lomo(model.parameters()))
    model.gradient_checkpointing_disable()
    lowtide.fuse(model, lowtide.Lomo(model.parameters()))
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="gradient_checkpointing_disable"):
        model(**tiny_batch())


class Checkpointed(nn.Module):
    """One linear layer used twice under checkpointing: reentrant, its hook fires twice with half a gradient each."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.layer, self.head, self.use_reentrant = nn.Linear(4, 4), nn.Linear(4, 1), use_reentrant

    def forward(self, x):
        x = x.requires_grad_()
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=self.use_reentrant)
        return self.head(x).mean()


def test_reentrant_checkpointing_is_refused_and_the_other_kind_works():
    model = Checkpointed(use_reentrant=True)
    engine = lowtide.fuse(model, lowtide.Lomo(model.parameters(), lr=0.1))
    before = model.layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="reentrant"):
        engine.backward(model(torch.randn(3, 4)))
    assert torch.equal(before, model.layer.weight)
    right, plain = Checkpointed(use_reentrant=False), None
    plain = twin(right)
    x = torch.randn(3, 4)
    lowtide.fuse(right, lowtide.Lomo(right.parameters(), lr=0.1)).backward(right(x.clone()))
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(x.clone()).backward()
    sgd.step()
    assert same_weights(right, plain)


def test_a_parameter_unfrozen_later_is_noticed():
    model = tiny_model()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    optimizer = lowtide.Lomo(model.parameters())
    engine = lowtide.fuse(model, optimizer, blocks=[])
    frozen.requires_grad_(True)
    engine.backward(model(**tiny_batch()).loss)
    with pytest.raises(RuntimeError, match="unfrozen"):
        optimizer.step()


def test_step_without_backward_does_nothing():
    model, optimizer, engine = setup()
    before = Snapshot(model)
    optimizer.step()
    assert same_weights(before, model) and engine.grad_norm is None


def test_a_block_output_that_cannot_be_joined_is_refused():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            x = self.layer(x)
            return x, x.sum()

    model = nn.ModuleDict({"block": Summed()})
    lowtide.fuse(model, lowtide.Lomo(model.parameters()), blocks=["block"], micro_batch_size=1)
    with pytest.raises(ValueError, match="micro_batch_size=None"):
        model["block"](torch.randn(3, 4))


def test_gradients_of_inputs_alone_do_not_train():
    model, _, engine = setup()
    before = Snapshot(model)
    embeds = model.model.embed_tokens(tiny_batch()["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, labels=tiny_batch()["labels"]).loss
    with pytest.raises(RuntimeError, match=r"autograd\.grad"):
        torch.autograd.grad(loss, embeds)
    assert same_weights(before, model)
    engine.backward(model(**tiny_batch()).loss)
    assert not same_weights(before, model)


def test_a_group_added_while_fused_is_refused():
    _, optimizer, engine = setup()
    extra = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="fuse the model again"):
        optimizer.add_param_group({"params": [extra]})
    engine.remove()
    optimizer.add_param_group({"params": [extra]})


def test_a_loss_from_before_the_last_step_is_refused():
    model, optimizer, engine = setup()
    stale = model(**tiny_batch(1)).loss
    engine.backward(model(**tiny_batch(0)).loss)
    optimizer.step()
    before = Snapshot(model)
    with pytest.raises(RuntimeError):  # ours, or autograd's own if it meets a changed weight outside the blocks first
        engine.backward(stale)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))


def test_a_regulariser_on_block_weights_is_explained():
    def regularised(model):
        return model(**tiny_batch()).loss + 1e-3 * sum(p.square().sum() for p in model.parameters())

    model, _, engine = setup()
    with pytest.raises(RuntimeError, match=r"blocks=\[\]"):
        engine.backward(regularised(model))
    model, plain = tiny_model(), tiny_model()
    lowtide.fuse(model, lowtide.Lomo(model.parameters(), lr=0.1), blocks=[], chunked_loss=False).backward(
        regularised(model)
    )
    regularised(plain).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert same_weights(model, plain)


def test_a_loss_that_is_not_finite_after_a_partial_step_is_a_skipped_one():
    model, optimizer, engine = setup()
    handle = model.model.layers[1].mlp.up_proj.weight.register_hook(lambda grad: grad * float("nan"))
    engine.backward(model(**tiny_batch()).loss)
    optimizer.step()
    assert engine.step_partial
    handle.remove()
    engine.backward(model(**tiny_batch()).loss * float("nan"))
    assert engine.step_skipped and not engine.step_partial


def test_the_state_of_an_earlier_step_is_loaded_into_an_engine_in_use():
    model, optimizer, engine = setup()
    engine.backward(model(**tiny_batch()).loss)
    optimizer.step()
    saved, weights = engine.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    results = []
    for _ in range(2):
        engine.backward(model(**tiny_batch(1)).loss)
        optimizer.step()
        results.append(Snapshot(model))
        engine.load_state_dict(saved)
        model.load_state_dict(weights)
    assert same_weights(*results)


def test_the_cache_of_autocast_gets_no_copy_of_a_weight():
    """It would hold 16-bit copies of all weights until the context is left."""
    model, optimizer, engine = setup()
    seen = []
    handle = model.model.layers[1].mlp.register_forward_hook(
        lambda *_: seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**tiny_batch()).loss
        assert torch.is_autocast_cache_enabled()
    engine.backward(loss)
    optimizer.step()
    handle.remove()
    assert seen == [(True, False)] * 2


def test_a_gradient_that_is_not_finite_is_reported():
    model, _, engine = setup()
    broken = model.model.layers[1].mlp.up_proj.weight
    broken.register_hook(lambda grad: grad * float("nan"))
    before = Snapshot(model)
    engine.backward(model(**tiny_batch()).loss)
    assert engine.step_partial and not engine.step_skipped
    changed = {
        name for (name, p), b in zip(model.named_parameters(), before.parameters(), strict=True) if not p.equal(b)
    }
    # The backward goes from the last block to the first: what came before the broken gradient is updated, nothing after.
    assert any(name.startswith("model.layers.2.") for name in changed)
    assert not any(name.startswith("model.layers.0.") for name in changed)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_float16_autocast_is_refused_without_loss_scaling():
    model, _, _ = setup()
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(RuntimeError, match="loss_scale='dynamic'"):
        model(**tiny_batch())


class TimeMajor(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x).square().mean()


def test_blocks_that_do_not_have_the_batch_first_are_refused():
    model = TimeMajor(batch_first=False)
    optimizer = lowtide.Lomo(model.parameters())
    with pytest.raises(ValueError, match="batch_first"):
        lowtide.fuse(model, optimizer, blocks=["encoder.layers"], micro_batch_size=2)
    model = TimeMajor(batch_first=True)
    plain, x = twin(model), torch.randn(4, 5, 16)
    engine = lowtide.fuse(
        model, lowtide.Lomo(model.parameters(), lr=0.1), blocks=["encoder.layers"], micro_batch_size=2
    )
    engine.backward(model(x))
    plain(x).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


class Biased(nn.Module):
    """Attention-like: a bias over heads whose number happens to be the batch size."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, position_bias):
        return self.layer(x) * position_bias.sum()


@pytest.mark.parametrize("positional", [True, False])
def test_biases_over_heads_are_not_cut_with_the_batch(positional):
    model = nn.ModuleDict({"block": Biased()})
    x, bias = torch.randn(4, 3, 4), torch.arange(4.0).view(4, 1, 1)
    expected = model["block"](x, bias)
    lowtide.fuse(model, lowtide.Lomo(model.parameters()), blocks=["block"], micro_batch_size=1)
    found = model["block"](x, bias) if positional else model["block"](x, position_bias=bias)
    torch.testing.assert_close(found, expected)


class Passing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, shared):
        shared["x"] = self.layer(x)
        return shared["x"]


def test_blocks_that_pass_tensors_on_the_side_are_refused():
    model = nn.ModuleDict({"block": Passing()})
    lowtide.fuse(model, lowtide.Lomo(model.parameters()), blocks=["block"])
    with pytest.raises(ValueError, match=r"blocks=\[\]"):
        model["block"](torch.randn(2, 4), UserDict())
    model = tiny_model()
    model.config.num_kv_shared_layers = 2
    with pytest.raises(ValueError, match="2 layers"):
        lowtide.fuse(model, lowtide.Lomo(model.parameters()))
