"""The door for code of the public lomo-optim: its results, its state, and what it got wrong."""

import copy
import logging
import math

import pytest
import torch

import lowtide
from helpers import TOLERANCE, Snapshot, largest_difference, same_weights, tiny_batch, tiny_model, twin
from lowtide.integrations import lomo_optim as door

RULES = {"Lomo": 0.1, "AdaLomo": 0.01}  # with a learning rate


@pytest.fixture(autouse=True)
def warn_again():
    door._warn_once.cache_clear()


@pytest.fixture
def oracle(monkeypatch):
    """The public package; AdaLomo's constructor calls ``cuda()``, which is made to do nothing."""
    package = pytest.importorskip("lomo_optim", reason="the test oracle lomo-optim is not installed (make test does)")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    return package


def public_loop(optimizer, model, batches, lr, same_loss=False):
    """As the public package's own README has it."""
    for batch in batches:
        loss = model(**batch).loss
        if optimizer.clip_grad_norm is not None:
            optimizer.grad_norm(loss)
            if not same_loss:
                loss = model(**batch).loss
        optimizer.fused_backward(loss, lr)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "options", [{}, {"clip_grad_norm": 0.3}, {"clip_grad_value": 0.01}, {"weight_decay": 0.1}], ids=str
)
def test_results_are_those_of_lomo_optim(rule, tied, options, oracle):
    theirs = tiny_model(tie_word_embeddings=tied)
    ours = twin(theirs)
    batches = [tiny_batch(step) for step in range(5)]
    public_loop(getattr(oracle, rule)(theirs, **options), theirs, batches, RULES[rule])
    public_loop(getattr(door, rule)(ours, **options), ours, batches, RULES[rule])
    assert largest_difference(theirs, ours) < 20 * TOLERANCE[torch.float32]  # their order of sums is another
    assert largest_difference(ours, tiny_model(tie_word_embeddings=tied)) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_the_same_loss_may_be_given_twice(rule):
    first = tiny_model()
    second = twin(first)
    batches = [tiny_batch(step) for step in range(3)]
    public_loop(getattr(door, rule)(first, clip_grad_norm=0.3), first, batches, RULES[rule])
    public_loop(getattr(door, rule)(second, clip_grad_norm=0.3), second, batches, RULES[rule], same_loss=True)
    assert same_weights(first, second)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_it_is_the_native_way_bit_for_bit(clip):
    native, model = tiny_model(), tiny_model()
    public_loop(door.AdaLomo(model, clip_grad_norm=clip), model, [tiny_batch(step) for step in range(3)], 0.01)
    adalomo = lowtide.AdaLomo(native.parameters(), lr=0.01)
    engine = lowtide.fuse(native, adalomo, clip_grad_norm=clip, chunked_loss=False)
    for step in range(3):
        engine.backward(native(**tiny_batch(step)).loss)
        adalomo.step()
    assert same_weights(native, model)


def clipped_sgd(model, batch, lr, max_norm):
    """One step of torch's own."""
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    torch.optim.SGD(model.parameters(), lr=lr).step()
    model.zero_grad()


def test_a_coefficient_is_used_once_and_only_for_its_own_batch(caplog):
    """Their package clips with the norm of whatever was measured last."""
    reference, model = tiny_model(), tiny_model()
    optimizer = door.Lomo(model, clip_grad_norm=0.3)
    optimizer.grad_norm(model(**tiny_batch(0)).loss)
    optimizer.fused_backward(model(**tiny_batch(1)).loss, 0.1)  # another batch than was measured
    optimizer.fused_backward(model(**tiny_batch(2)).loss, 0.1)  # nothing was measured
    for step in (1, 2):
        clipped_sgd(reference, tiny_batch(step), 0.1, 0.3)
    assert largest_difference(reference, model) < TOLERANCE[torch.float32]
    assert sum("measured again" in record.message for record in caplog.records) == 1


def test_with_dropout_the_norm_is_that_of_the_gradients_that_are_applied():
    model = tiny_model("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    reference = twin(model)
    optimizer = door.Lomo(model, clip_grad_norm=0.3)
    torch.manual_seed(1)
    optimizer.grad_norm(model(**tiny_batch()).loss)
    torch.manual_seed(2)
    optimizer.fused_backward(model(**tiny_batch()).loss, 0.1)
    torch.manual_seed(2)
    clipped_sgd(reference, tiny_batch(), 0.1, 0.3)
    assert largest_difference(reference, model) < TOLERANCE[torch.float32]


def test_a_second_forward_pass_does_not_keep_the_gradients_of_all_blocks():
    model = tiny_model(tie_word_embeddings=False)
    optimizer = door.Lomo(model, clip_grad_norm=0.3)
    loss = model(**tiny_batch()).loss
    optimizer.grad_norm(loss)
    second = model(**tiny_batch()).loss  # while the graph of the first is alive
    assert not any(slot.shared for slot in optimizer.engine._slots.values())
    optimizer.fused_backward(second, 0.1)


def test_grad_norm_without_clipping_only_measures():
    reference, model = tiny_model(), tiny_model()
    optimizer = door.Lomo(model)
    loss = model(**tiny_batch()).loss
    norm = optimizer.grad_norm(loss)
    optimizer.fused_backward(loss, 0.1)
    reference(**tiny_batch()).loss.backward()
    assert norm == pytest.approx(torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()]).item())
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    assert largest_difference(reference, model) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_goes_round(rule, dtype):
    """Three steps, saved and loaded, three more: the same as six."""
    make, lr = getattr(door, rule), RULES[rule]
    batches = [tiny_batch(step) for step in range(6)]
    straight, halved = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    public_loop(make(straight, clip_grad_norm=0.3), straight, batches, lr, same_loss=True)
    first = make(halved, clip_grad_norm=0.3)
    public_loop(first, halved, batches[:3], lr, same_loss=True)
    saved = copy.deepcopy(first.state_dict())
    first.engine.remove()
    second = make(halved, clip_grad_norm=0.3)
    second.load_state_dict(saved)
    assert second.lr == lr
    public_loop(second, halved, batches[3:], lr, same_loss=True)
    assert same_weights(straight, halved)


def test_a_state_of_lomo_optim_gives_its_learning_rate(oracle, caplog):
    saved = oracle.AdaLomo(tiny_model(), lr=0.25).state_dict()
    optimizer = door.AdaLomo(tiny_model())
    optimizer.load_state_dict(saved)
    assert optimizer.lr == 0.25 and "saved by lomo-optim" in caplog.text


@pytest.mark.parametrize("answer", ["continue", "go on"])
def test_an_overflow_in_float16_skips_the_step_and_lowers_the_scale(answer):
    model = tiny_model(dtype=torch.float16)
    optimizer = door.Lomo(model, clip_grad_norm=1.0, loss_scale_args={"init_scale": 2**24})
    before, scale = Snapshot(model), optimizer.loss_scaler.loss_scale
    loss = model(**tiny_batch()).loss
    assert not math.isfinite(optimizer.grad_norm(loss)) and optimizer.loss_scaler.has_overflow_serial
    if answer == "go on":
        optimizer.fused_backward(model(**tiny_batch()).loss, 0.1)
    assert same_weights(before, model) and optimizer.loss_scaler.loss_scale == scale / 2
    assert optimizer.engine.num_skipped_steps == 1
    for step in range(30):
        loss = model(**tiny_batch(step)).loss
        optimizer.grad_norm(loss)
        if not optimizer.loss_scaler.has_overflow_serial:
            optimizer.fused_backward(loss, 0.1)
    assert not optimizer.loss_scaler.has_overflow_serial and not same_weights(before, model)
    assert all(torch.isfinite(param).all() for param in model.parameters())


def test_a_loss_that_is_not_finite_updates_nothing():
    model = tiny_model()
    optimizer, before = door.Lomo(model), Snapshot(model)
    optimizer.fused_backward(model(**tiny_batch()).loss * math.nan, 0.1)
    assert same_weights(before, model) and optimizer.engine.step_skipped
    optimizer.fused_backward(model(**tiny_batch()).loss, 0.1)
    assert not same_weights(before, model)


def test_the_logits_are_there_and_checkpointing_is_taken_over(caplog):
    model = tiny_model()
    model.gradient_checkpointing_enable()
    optimizer = door.Lomo(model)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert "recomputes" in caplog.text
    out = model(**tiny_batch())
    assert out.logits is not None
    optimizer.fused_backward(out.logits.float().pow(2).mean(), 0.1)


def test_arguments_without_meaning_are_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            door.Lomo(tiny_model(), loss_scale_args={"delayed_shift": 2})
            door.AdaLomo(tiny_model(), loss_scale=2**12)
        door.AdaLomo(tiny_model(), loss_scale=None, clip_grad_value=0)
    assert [record.message.split(" ")[0] for record in caplog.records] == ["delayed_shift", "loss_scale"]


def test_errors_say_what_to_do():
    model = tiny_model()
    with pytest.raises(ValueError, match="clip_grad_norm must be positive"):
        door.Lomo(model, clip_grad_norm=0.0)
    optimizer = door.Lomo(model)
    with pytest.raises(RuntimeError, match=r"engine.remove\(\)"):
        door.AdaLomo(model)
    loss = model(**tiny_batch()).loss
    for lr in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr must be"):
            optimizer.fused_backward(loss, lr)
    optimizer.fused_backward(loss, 0.1)
    with pytest.raises(RuntimeError, match="before the last step|second time"):
        optimizer.fused_backward(loss, 0.1)


def test_the_engine_clips_with_a_norm_that_was_measured_before():
    """Also where gradients would be kept between two passes of its own."""
    reference = tiny_model()
    model = twin(reference)
    lomo = lowtide.Lomo(model.parameters(), lr=0.1)
    engine = lowtide.fuse(model, lomo, clip_grad_norm=0.3, clip_memory_bytes=10**9)
    engine.backward(model(**tiny_batch(0)).loss, engine.measure_norm(model(**tiny_batch(0)).loss))
    lomo.step()
    clipped_sgd(reference, tiny_batch(0), 0.1, 0.3)
    assert largest_difference(reference, model) < TOLERANCE[torch.float32]
    engine.remove()
    adaptive = lowtide.fuse(model, lomo, clip_grad_norm=0.3, clip="adaptive")
    with pytest.raises(RuntimeError, match="adaptive"):
        adaptive.measure_norm(model(**tiny_batch(0)).loss)
