"""Weights that live elsewhere end bit-identical to weights that stay, whatever the home, and copies may land late."""

import pytest
import torch
from streaming import RULES, make_late, train
from torch import nn

import lowtide
import lowtide.fusing
from helpers import same_weights, tiny_batch, tiny_model
from lowtide.weights import lanes, streamed
from streaming_cpu import stream_on_cpu

LAYERS = "model.layers"


def homes(kind, directory):
    """What to pass as ``weights``."""
    if kind == "mix":
        return {"": "cpu", f"{LAYERS}.0": "device", f"{LAYERS}.1": directory}
    return {"host": "cpu", "disk": directory, "device": "device"}[kind]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["host", "disk", "mix"])
def test_same_bits_as_on_the_device(kind, rule, dtype, tied, tmp_path, monkeypatch):
    stream_on_cpu(monkeypatch)
    changes = {"tie_word_embeddings": tied}
    for options in ({}, {"clip_grad_norm": 0.3, "micro_batch_size": 3}):
        expected, _, expected_norms = train("device", rule, dtype, changes=changes, **options)
        weights = homes(kind, tmp_path / f"weights-{len(options)}")
        found, home, norms = train(weights, rule, dtype, changes=changes, **options)
        assert same_weights(expected, found) and norms == expected_norms
        assert sum(each.num_reads for each in home.streamed) > (10 if kind != "mix" else 0), "nothing moved"
        assert len(home.streamed) == (2 if kind == "mix" else 1)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt_neox", "gpt2", "mixtral", "qwen3_moe"])
def test_other_architectures(family, tmp_path):
    expected, _, _ = train("device", family=family, num_steps=3)
    found, _, _ = train(tmp_path / "weights", family=family, num_steps=3)
    assert same_weights(expected, found)


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_copies_that_land_late(kind, tmp_path, monkeypatch):
    stream_on_cpu(monkeypatch)
    make_late(monkeypatch)
    changes = {"num_hidden_layers": 5, "tie_word_embeddings": False}
    expected, _, _ = train("device", changes=changes, num_steps=4, clip_grad_norm=0.3)
    found, _, _ = train(homes(kind, tmp_path / "weights"), changes=changes, num_steps=4, clip_grad_norm=0.3)
    assert same_weights(expected, found)


@pytest.mark.parametrize("missing", ["use waits for the read", "read waits for the write"])
def test_a_missing_wait_is_caught(missing, monkeypatch):
    """The test before this one can fail."""
    stream_on_cpu(monkeypatch)
    make_late(monkeypatch)
    if missing == "use waits for the read":
        monkeypatch.setattr(lanes.ThreadTransfer, "wait", lambda self: None)
    else:
        monkeypatch.setattr(lanes.ThreadTransfer, "synchronize", lambda self: None)
    changes = {"num_hidden_layers": 5, "tie_word_embeddings": False}
    expected, _, _ = train("device", changes=changes, num_steps=4)
    try:
        found, _, _ = train("cpu", changes=changes, num_steps=4)
    except RuntimeError:  # the gradients were NaN
        return
    assert not same_weights(expected, found)


def test_every_copy_comes_after_the_computation_before_it(monkeypatch):
    """On a GPU nothing else holds a copy back from a slot that is still computed with."""
    stream_on_cpu(monkeypatch)
    submitted, made = {"read": [], "write": []}, []

    class Marker:
        def synchronize(self):
            pass

        wait = synchronize

        def finished(self):
            return True

    class Recording(lanes.ThreadLane):
        def __init__(self, name):
            super().__init__(name)
            self.name = name

        def marker(self):
            made.append(Marker())
            return made[-1]

        def submit(self, copy, after=()):
            submitted[self.name].append(any(isinstance(each, Marker) for each in after))
            return super().submit(copy, after)

    monkeypatch.setattr(streamed, "make_lane", lambda device, name, blocks_host: Recording(name))
    train("cpu", num_steps=3, changes={"num_hidden_layers": 5})
    assert all(submitted["write"]) and len(submitted["write"]) == 3 * 6  # embedding and head are tied: one block
    reads = submitted["read"]  # the first few go into slots that were never used, or read ahead in vain
    assert len(reads) > 20 and all(reads[-10:]) and not any(reads[:3])


def test_the_next_block_is_read_ahead(monkeypatch):
    """In a step that has been seen before, no block is read when it is asked for: all have been begun earlier."""
    stream_on_cpu(monkeypatch)
    late = []
    original = streamed.StreamedHome.fetch

    def fetch(self, block):
        late.append(self._slot_of(self.members[block]) is None)
        original(self, block)

    monkeypatch.setattr(streamed.StreamedHome, "fetch", fetch)
    changes = {"num_hidden_layers": 6, "tie_word_embeddings": False}
    for options, per_step in (({}, 2 * 8), ({"clip_grad_norm": 1.0}, 3 * 8)):
        late.clear()
        train("cpu", num_steps=4, changes=changes, **options)
        assert len(late) == 4 * per_step + 3  # to look at the head, before training
        assert not any(late[3 + per_step + 1 :])


def test_weights_that_are_away_are_nan_and_cannot_be_written(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = lowtide.fuse(model, RULES["lomo"](model.parameters()), weights=tmp_path / "weights")
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.shape == (48, 32) and weight.isnan().all() and weight.untyped_storage().nbytes() == 4
    with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
        weight.add_(1.0)
    assert not model.model.norm.weight.isnan().any(), "what is in no block stays"
    state = engine.state_dict_of_model()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)
    engine.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluation_and_generation_while_streamed(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    ids = tiny_batch(padded=False)["input_ids"]
    expected = model.eval()(input_ids=ids).logits
    engine = lowtide.fuse(model.train(), RULES["lomo"](model.parameters()), weights=tmp_path / "weights")
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, expected)
        assert model.generate(ids[:1], max_new_tokens=4, do_sample=False).shape == (1, ids.shape[1] + 4)
    model.train()
    logits = model(input_ids=ids).logits  # with a graph, without labels: a loss of the user's own
    engine.backward(logits.float().logsumexp(-1).mean())
    engine.optimizers[0].step()
    engine.remove()
    assert not any(value.isnan().any() for value in model.state_dict().values())


def test_saved_by_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    engine = lowtide.fuse(model, RULES["lomo"](model.parameters()), weights=tmp_path / "weights")
    engine.backward(model(**tiny_batch()).loss)
    engine.optimizers[0].step()
    model.save_pretrained(tmp_path / "saved", state_dict=engine.state_dict_of_model(), max_shard_size="20KB")
    engine.remove()
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32))


def test_frozen_blocks_are_read_and_never_written(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    model.model.layers[1].requires_grad_(False)
    optimizer = RULES["lomo"]([p for p in model.parameters() if p.requires_grad])
    engine = lowtide.fuse(model, optimizer, weights=tmp_path / "weights")
    store = engine.home.streamed[0].store
    at_first = store.bytes_written
    sizes = [layout.num_bytes for layout in engine.home.streamed[0].layouts]
    engine.backward(model(**tiny_batch()).loss)
    optimizer.step()
    engine.remove()
    assert store.bytes_written - at_first == sum(sizes) - sizes[2]  # the embedding comes first


def test_parameters_used_outside_of_blocks_stay(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.out = nn.Linear(8, 8, bias=False)
            self.out.weight = self.layers[2].weight

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).tanh()
            return self.out(x).square().mean()

    results = []
    for weights in ("device", tmp_path / "weights"):
        torch.manual_seed(0)
        net = Net()
        optimizer = lowtide.Lomo(net.parameters(), lr=0.1)
        engine = lowtide.fuse(net, optimizer, blocks=["layers"], weights=weights)
        assert not net.out.weight.isnan().any()
        for step in range(3):
            engine.backward(net(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))))
            optimizer.step()
        engine.remove()
        results.append(net)
    assert same_weights(*results)


def test_an_error_in_a_block_leaves_the_pool_in_order(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    optimizer = RULES["lomo"](model.parameters())
    engine = lowtide.fuse(model, optimizer, weights=tmp_path / "weights")
    for _ in range(4):  # more often than the pool has slots
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[1, 200]]))
    hook = model.model.layers[1].mlp.register_forward_pre_hook(_fail)
    with pytest.raises(KeyError):
        model(**tiny_batch())
    hook.remove()
    engine.backward(model(**tiny_batch()).loss)
    optimizer.step()
    assert not any(slot.num_users for slot in engine.home.streamed[0]._slots)
    engine.remove()


def _fail(*args):
    raise KeyError("made up")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("gpu", "must be 'device', 'cpu', or a directory"),
        ({"model.layer": "cpu"}, "no block of this model"),
        ({"model.layers.0": "/a", "model.layers.1": "/b"}, "one directory"),
    ],
)
def test_bad_homes(weights, message, monkeypatch):
    stream_on_cpu(monkeypatch)
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        lowtide.fuse(model, RULES["lomo"](model.parameters()), weights=weights)
    engine = lowtide.fuse(model, RULES["lomo"](model.parameters()))  # nothing has happened to it
    engine.remove()


def test_a_module_without_blocks_cannot_be_streamed(tmp_path):
    net = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="only live elsewhere in blocks"):
        lowtide.fuse(net, lowtide.Lomo(net.parameters()), weights=tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_a_home_that_cannot_be_made_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    """Weights that had moved to another home by then come back, and the next attempt finds them."""
    stream_on_cpu(monkeypatch)
    model, twin = tiny_model(), tiny_model()
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    optimizer = lowtide.Lomo(model.parameters(), lr=0.1)
    with pytest.raises(FileExistsError):
        lowtide.fuse(model, optimizer, weights={"": "cpu", "model.layers.1": full})
    assert same_weights(model, twin) and [path.name for path in full.iterdir()] == ["file"]
    homes = {"": "cpu", "model.layers.1": tmp_path / "w"}
    original, calls = torch.Tensor.to, []

    def no_room(self, *args, **kwargs):
        calls.append(self)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lowtide.weights.placing._fill", fill_and_then(no_room, monkeypatch))
    with pytest.raises(torch.OutOfMemoryError):
        lowtide.fuse(model, optimizer, weights=homes)
    monkeypatch.undo()
    stream_on_cpu(monkeypatch)
    assert torch.Tensor.to is original and calls
    assert same_weights(model, twin) and not (tmp_path / "w").exists()
    engine = lowtide.fuse(model, optimizer, weights=homes)
    engine.backward(model(**tiny_batch()).loss)
    engine.remove()
    assert not same_weights(model, twin)


def fill_and_then(no_room, monkeypatch):
    """After all homes are there, what stays on the device cannot be moved to it."""
    from lowtide.weights import placing

    original = placing._fill

    def fill(*args):
        original(*args)
        monkeypatch.setattr(torch.Tensor, "to", no_room)

    return fill
