import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from helpers import tiny_batch, tiny_model
from lowtide.models import loss as module
from lowtide.models.chunked_loss import ChunkedLoss, causal_lm_loss
from lowtide.models.loss import linear_cross_entropy

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "gpt_neox", "gpt2", "mixtral", "qwen3_moe", "cohere", "granite"]


def reference(hidden, weight, labels, bias, scale, softcap, reduction):
    logits = functional.linear(hidden, weight, bias).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


def loss_and_grads(function, tensors, *args, **kwargs):
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    loss = function(tensors, *args, **kwargs)
    (loss * 1.7).backward()
    return loss.detach(), [None if t is None else t.grad for t in tensors]


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 30),
    vocab=st.integers(2, 80),
    max_logits=st.integers(20, 4000),
    with_bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3]),
    softcap=st.sampled_from([None, 5.0]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_equals_plain_cross_entropy(tokens, vocab, max_logits, with_bias, scale, softcap, reduction):
    generator = torch.Generator().manual_seed(tokens * 100 + vocab)
    hidden = torch.randn(2, tokens, 8, generator=generator)
    weight = torch.randn(vocab, 8, generator=generator)
    bias = torch.randn(vocab, generator=generator) if with_bias else None
    labels = torch.randint(vocab, (2, tokens), generator=generator)
    labels[0, : tokens // 2] = -100
    kept = module._MAX_LOGITS, module._MIN_SLICE
    module._MAX_LOGITS, module._MIN_SLICE = max_logits, 7
    try:
        ours, our_grads = loss_and_grads(
            lambda t: linear_cross_entropy(
                t[0], t[1], labels, bias=t[2], scale=scale, softcap=softcap, reduction=reduction
            ),
            (hidden, weight, bias),
        )
    finally:
        module._MAX_LOGITS, module._MIN_SLICE = kept
    theirs, their_grads = loss_and_grads(
        lambda t: reference(t[0], t[1], labels, t[2], scale, softcap, reduction), (hidden, weight, bias)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(our_grads, their_grads, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="needs torch >= 2.13 for its own operator")
def test_equals_torchs_operator():
    hidden, weight, labels = torch.randn(40, 16), torch.randn(50, 16), torch.randint(50, (40,))
    labels[3] = -100
    options = torch.nn.LinearCrossEntropyOptions()
    ours, our_grads = loss_and_grads(lambda t: linear_cross_entropy(t[0], t[1], labels), (hidden, weight))
    theirs, their_grads = loss_and_grads(
        lambda t: functional.linear_cross_entropy(t[0], t[1], labels, options=options), (hidden, weight)
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_grads, their_grads, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_close_to_exact_as_the_plain_way():
    hidden, weight = torch.randn(64, 32).bfloat16(), (torch.randn(500, 32) / 4).bfloat16()
    labels = torch.randint(500, (64,))
    exact, exact_grads = loss_and_grads(
        lambda t: functional.cross_entropy(t[0] @ t[1].t(), labels), (hidden.float(), weight.float())
    )
    plain, plain_grads = loss_and_grads(
        lambda t: functional.cross_entropy((t[0] @ t[1].t()).float(), labels), (hidden, weight)
    )
    ours, our_grads = loss_and_grads(lambda t: linear_cross_entropy(t[0], t[1], labels), (hidden, weight))
    assert abs(ours - exact) < 2 * abs(plain - exact) + 1e-3
    for a, b, e in zip(our_grads, plain_grads, exact_grads, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - e).norm() < 1.2 * (b.float() - e).norm()


def test_no_label_counts():
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    labels = torch.full((2, 3), -100)
    assert linear_cross_entropy(hidden, weight, labels).isnan()
    linear_cross_entropy(hidden, weight, labels, reduction="sum").backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_logits_of_all_tokens_never_exist_in_float32():
    """The largest float32 tensor made on the way is bounded by the slice, not by tokens x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                self.numel = max(self.numel, out.numel())
            return out

    tokens, vocab = 512, 8192
    hidden = torch.randn(tokens, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, 8, dtype=torch.bfloat16, requires_grad=True)
    kept = module._MAX_LOGITS
    module._MAX_LOGITS = 2**19
    try:
        with Largest() as largest:
            linear_cross_entropy(hidden, weight, torch.randint(vocab, (tokens,))).backward()
    finally:
        module._MAX_LOGITS = kept
    assert largest.numel <= 2**19 < tokens * vocab


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", [0, 1, 3, 100])
def test_kept_logits_are_the_same_bits_and_are_not_made_again(monkeypatch, dtype, slices):
    tokens, vocab = 40, 3 * 64 + 11
    monkeypatch.setattr(module, "_MIN_SLICE", 64)
    monkeypatch.setattr(module, "_MAX_LOGITS", 64 * 25)  # two slices of the tokens
    hidden, weight = torch.randn(tokens, 16).to(dtype), torch.randn(vocab, 16).to(dtype)
    bias, labels = torch.randn(vocab).to(dtype), torch.randint(vocab, (tokens,))
    way = partial(call_with_all, labels=labels, scale=0.7, softcap=15.0)
    monkeypatch.setattr(module, "_MAX_KEPT_BYTES", 0)
    expected = loss_and_grads(way, (hidden, weight, bias))
    calls, product = [], module._product
    monkeypatch.setattr(module, "_product", lambda *args: calls.append(1) or product(*args))
    monkeypatch.setattr(module, "_MAX_KEPT_BYTES", slices * tokens * 64 * hidden.element_size())
    torch.testing.assert_close(loss_and_grads(way, (hidden, weight, bias)), expected, rtol=0, atol=0)
    forward, again = [2, 2, 2, 2], [2, 2, 2, 1]  # calls for each slice of the vocabulary; the last one is narrow
    assert len(calls) == sum(forward) + sum(again[slices:])


def call_with_all(tensors, labels, **options):
    hidden, weight, bias = tensors
    return linear_cross_entropy(hidden, weight, labels, bias=bias, **options)


def test_kept_logits_go_with_the_backward_pass_and_none_wait_without_one():
    hidden, weight = torch.randn(30, 16, requires_grad=True), torch.randn(2000, 16, requires_grad=True)
    labels = torch.randint(2000, (30,))
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels).grad_fn is None
    made = []
    keep = module._KeptLogits.put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module._KeptLogits, "put", lambda kept, *args: (keep(kept, *args), made.extend(kept._slices.values()))
        )
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, labels)
        assert not made
        loss = linear_cross_entropy(hidden, weight, labels)
    waiting = [weakref.ref(each) for each in made]
    made.clear()
    assert waiting and all(each() is not None for each in waiting)
    loss.backward(retain_graph=True)
    assert all(each() is None for each in waiting)
    first = weight.grad.clone()
    loss.backward()  # makes them again
    torch.testing.assert_close(weight.grad, 2 * first, rtol=0, atol=0)


@pytest.mark.parametrize("label", [-1, 7, 2**31])
def test_a_label_that_is_no_token_is_refused(label):
    hidden, weight, labels = torch.randn(2, 3, 4), torch.randn(7, 4), torch.tensor([[0, 6, -100], [1, label, 2]])
    with pytest.raises(ValueError, match=f"labels hold {label}, and the vocabulary has 7 entries"):
        linear_cross_entropy(hidden, weight, labels)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long), reduction="none")


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_many_families_give_their_own_loss(family):
    model = tiny_model(family)
    batch = tiny_batch()
    expected = model(**batch).loss
    assert ChunkedLoss.of(model) is not None
    assert model.training
    torch.testing.assert_close(causal_lm_loss(model, **batch), expected, rtol=1e-5, atol=1e-5)


def test_the_head_check_tells_caps_and_scales_apart():
    model = tiny_model("gemma2")
    wrong = ChunkedLoss(model, softcap=None)
    assert not wrong._agrees() and ChunkedLoss.of(model).softcap == model.config.final_logit_softcapping
    assert not ChunkedLoss(tiny_model("cohere"), scale=1.0)._agrees()


def test_a_head_that_is_not_understood_keeps_the_models_own_loss():
    model = tiny_model()
    own = model.forward

    def strange(*args, **kwargs):
        out = own(*args, **kwargs)
        out.loss = out.loss * 1.1
        return out

    model.forward = strange
    assert ChunkedLoss.of(model) is None
    with pytest.raises(ValueError, match="head"):
        causal_lm_loss(model, **tiny_batch())


def test_autocast_gradients_are_as_good_as_the_plain_way():
    hidden, weight, labels = torch.randn(64, 128), torch.randn(1000, 128) / 4, torch.randint(1000, (64,))
    _, exact = loss_and_grads(lambda t: functional.cross_entropy(t[0] @ t[1].t(), labels), (hidden, weight))

    def under_autocast(function):
        def call(tensors):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(tensors)

        return loss_and_grads(call, (hidden, weight))[1]

    plain = under_autocast(lambda t: functional.cross_entropy((t[0] @ t[1].t()).float(), labels))
    ours = under_autocast(lambda t: linear_cross_entropy(t[0], t[1], labels))
    for a, b, e in zip(ours, plain, exact, strict=True):
        assert a.dtype == torch.float32 and (a - e).norm() < 1.2 * (b - e).norm()


def test_a_forward_that_was_replaced_before_comes_back():
    model = tiny_model()
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    replaced = model.forward
    loss = ChunkedLoss.of(model)
    loss.install()
    assert model.forward != replaced
    loss.remove()
    assert model.forward is replaced


def test_a_model_without_a_loss_of_its_own_is_left_alone():
    model = tiny_model()
    own = model.forward
    model.forward = lambda *args, labels=None, **kwargs: own(*args, **kwargs)
    assert ChunkedLoss.of(model) is None


def test_router_loss_asked_for_in_the_call_is_refused():
    model = tiny_model("qwen3_moe")
    ChunkedLoss.of(model).install()
    with pytest.raises(ValueError, match="router"):
        model(**tiny_batch(), output_router_logits=True)


def test_num_items_in_batch_is_the_divisor():
    model, batch = tiny_model(), tiny_batch()
    mean = causal_lm_loss(model, **batch)
    counted = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(causal_lm_loss(model, num_items_in_batch=2 * counted, **batch), mean / 2)
