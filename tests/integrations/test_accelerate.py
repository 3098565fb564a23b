"""A loop with accelerate on the fused engine, against the same loop with ordinary optimizers."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader

from helpers import same_weights, tiny_batch, tiny_model
from lowtide import AdaLomo, Lomo, fuse
from lowtide.integrations.accelerate import fuse_accelerator

LR = 0.05


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate keeps its settings for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def rows(num_batches=3):
    """The rows of some batches, one dictionary each."""
    whole = [tiny_batch(seed, padded=False) for seed in range(num_batches)]
    return [{name: value[row] for name, value in batch.items()} for batch in whole for row in range(8)]


def loop(accelerator, model, optimizer, max_norm=None):
    """As anybody would write it; returns the norms."""
    loader = DataLoader(rows(), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    norms = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if max_norm is not None and accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), max_norm).item())
            optimizer.step()
            optimizer.zero_grad()
    return norms


def assert_near(first, second):
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_same_loop_as_with_sgd(max_norm, micro_batch_size):
    model = tiny_model()
    plain = copy.deepcopy(model)
    expected = loop(Accelerator(cpu=True), plain, torch.optim.SGD(plain.parameters(), lr=LR), max_norm)

    accelerator, optimizer = Accelerator(cpu=True), Lomo(model.parameters(), lr=LR)
    options = {"micro_batch_size": micro_batch_size, "clip_grad_norm": max_norm}
    engine = fuse_accelerator(accelerator, model, optimizer, **options)
    norms = loop(accelerator, model, optimizer, max_norm)
    engine.remove()
    assert norms == pytest.approx(expected, rel=1e-5) and len(norms) == (0 if max_norm is None else 3)
    assert_near(model, plain)


def test_clipping_that_would_have_been_ignored_is_refused():
    model, accelerator = tiny_model(), Accelerator(cpu=True)
    optimizer = Lomo(model.parameters(), lr=LR)
    fuse_accelerator(accelerator, model, optimizer)
    with pytest.raises(ValueError, match=r"too late to clip to 0\.5: give fuse_accelerator clip_grad_norm=0\.5"):
        loop(accelerator, model, optimizer, max_norm=0.5)
    with pytest.raises(ValueError, match="clip_grad_value=1"):
        accelerator.clip_grad_value_(model.parameters(), 1)


def test_another_norm_and_other_arguments_are_refused():
    model, accelerator = tiny_model(), Accelerator(cpu=True)
    fuse_accelerator(accelerator, model, Lomo(model.parameters(), lr=LR), clip_grad_norm=1.0)
    with pytest.raises(ValueError, match="2-norm"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0, norm_type=1)
    with pytest.raises(ValueError, match="takes no retain_graph"):
        accelerator.backward(model(**tiny_batch()).loss, retain_graph=True)


def test_autocast_to_bfloat16():
    """The same as with SGD under the same autocast; not the same as without."""
    model = tiny_model()
    autocast, exact = copy.deepcopy(model), copy.deepcopy(model)
    accelerator, optimizer = Accelerator(cpu=True, mixed_precision="bf16"), Lomo(model.parameters(), lr=LR)
    engine = fuse_accelerator(accelerator, model, optimizer)
    loop(accelerator, model, optimizer)
    engine.remove()
    loop(Accelerator(cpu=True), autocast, torch.optim.SGD(autocast.parameters(), lr=LR))
    optimizer = torch.optim.SGD(exact.parameters(), lr=LR)
    for batch in DataLoader(rows(), batch_size=8):
        exact(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(param.dtype == torch.float32 for param in model.parameters())
    assert_near(model, autocast)
    assert not same_weights(model, exact)


def test_state_is_saved_and_loaded(tmp_path):
    """Two parts with AdaLomo and stochastic rounding are one whole run, bit for bit."""

    def begin():
        model = tiny_model(dtype=torch.bfloat16)
        accelerator, optimizer = Accelerator(cpu=True), AdaLomo(model.parameters(), lr=LR)
        engine = fuse_accelerator(accelerator, model, optimizer)
        return model, accelerator, optimizer, engine

    model, accelerator, optimizer, engine = begin()
    loop(accelerator, model, optimizer)
    accelerator.save_state(tmp_path / "state")
    loop(accelerator, model, optimizer)
    engine.remove()
    again, accelerator, optimizer, engine = begin()
    accelerator.prepare(again, optimizer)
    accelerator.load_state(tmp_path / "state")
    assert engine.state_dict()["num_steps"] == 3
    loop(accelerator, again, optimizer)
    engine.remove()
    assert same_weights(model, again)


def test_afterwards_all_are_ordinary_again():
    model = tiny_model()
    accelerator, optimizer = Accelerator(cpu=True, mixed_precision="bf16"), Lomo(model.parameters(), lr=LR)
    engine = fuse_accelerator(accelerator, model, optimizer)
    with pytest.raises(ValueError, match="has a fused model already"):
        other = tiny_model()
        fuse_accelerator(accelerator, other, Lomo(other.parameters(), lr=LR))
    loop(accelerator, model, optimizer)
    engine.remove()
    engine.remove()
    pickle.dumps(model)
    assert accelerator.backward.__func__ is Accelerator.backward
    before = [param.detach().clone() for param in model.parameters()]
    accelerator.backward(model(**tiny_batch()).loss)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    assert all(param.grad is not None for param in model.parameters())


def test_what_cannot_work_is_refused():
    model = tiny_model()
    optimizer = Lomo(model.parameters(), lr=LR)
    with pytest.raises(ValueError, match="weights that live elsewhere"):
        fuse_accelerator(Accelerator(cpu=True), model, optimizer, weights="./somewhere")
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=4 .* micro_batch_size"):
        fuse_accelerator(Accelerator(cpu=True, gradient_accumulation_steps=4), model, optimizer)
    accelerator = Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    with pytest.raises(ValueError, match=r"comes before accelerator\.prepare"):
        fuse_accelerator(accelerator, prepared, wrapped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_processes": 2}, "accelerate runs 2 processes"),
        ({"distributed_type": "DEEPSPEED"}, "accelerate's DEEPSPEED shards"),
        ({"distributed_type": "FSDP"}, "accelerate's FSDP shards"),
        ({"scaler": object()}, "mixed_precision='fp16'"),
    ],
)
def test_what_this_machine_cannot_start_is_refused(changes, message):
    """Made up, as accelerate itself refuses to make them without the hardware."""
    model = tiny_model()
    values = {"num_processes": 1, "distributed_type": "NO", "scaler": None, "gradient_accumulation_steps": 1} | changes
    made_up = type("Accelerator", (), values)()
    with pytest.raises(ValueError, match=message):
        fuse_accelerator(made_up, model, Lomo(model.parameters(), lr=LR))


# Without fuse_accelerator ---------------------------------------------------------------------------------------------


def test_accumulating_with_a_fused_model_is_refused_in_the_second_backward():
    model, accelerator = tiny_model(), Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = Lomo(model.parameters(), lr=LR)
    fuse(model, optimizer)
    with pytest.raises(RuntimeError, match=r"second backward pass before step\(\).*micro_batch_size"):
        loop(accelerator, model, optimizer)


def test_exact_clipping_needs_the_engine():
    model, accelerator = tiny_model(), Accelerator(cpu=True)
    optimizer = Lomo(model.parameters(), lr=LR)
    fuse(model, optimizer, clip_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"call engine\.backward\(loss\)"):
        loop(accelerator, model, optimizer)
