"""Gradients of the vocabulary matrices in slices: the same updates as with whole gradients, and never a whole gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import lowtide
from lowtide.fused import engine as engine_module
from lowtide.fused import slices as slices_module
from lowtide.models import loss as loss_module
from lowtide.optim import kernels, rounding, sliced
from lowtide.optim.rounding import noise16, noise16_of_rows

VOCAB, HIDDEN = 301, 24  # slices do not divide it


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Several slices of the vocabulary and of the tokens in so small a model."""
    monkeypatch.setattr(sliced, "MAX_SLICE_NUMEL", 100 * HIDDEN)
    monkeypatch.setattr(sliced, "_FEWEST_ROWS", 8)
    monkeypatch.setattr(loss_module, "_MIN_SLICE", 64)
    monkeypatch.setattr(loss_module, "_MAX_LOGITS", 64 * 20)


def make_model(tied, dtype=torch.float32, layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        vocab_size=VOCAB, tie_word_embeddings=tied, use_cache=False, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).train()


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        ids = torch.randint(1, VOCAB, (4, 9), generator=generator)
        ids[1, 5:] = 0  # padding, in several rows of the batch, and the embedding has a padding_idx
        ids[2] = 7  # one token again and again
        labels = ids.masked_fill(ids == 0, -100)
        yield {"input_ids": ids, "labels": labels}


def trained(slices, *, tied, dtype=torch.float32, rule=lowtide.Lomo, steps=3, lr=None, seen=None, **options):
    model = make_model(tied, dtype)
    names = ("weight_decay", "rounding")
    of_rule = {name: options.pop(name) for name in names if name in options}
    optimizer = rule(model.parameters(), lr=lr or (0.05 if rule is lowtide.Lomo else 1e-2), **of_rule)
    engine = lowtide.fuse(model, optimizer, vocabulary_slices=slices, **options)
    norms = []
    for batch in batches(steps):
        engine.backward(model(**batch).loss)
        norms.append(engine.grad_norm)
        optimizer.step()
        assert not engine.step_skipped and not engine.step_partial
    if seen is not None:
        seen.append(engine)
    state = {name: value for name, value in optimizer.state[model.lm_head.weight].items() if torch.is_tensor(value)}
    return model.state_dict(), norms, state


OPTIONS = {
    "plain": {},
    "exact": {"clip_grad_norm": 0.5},
    "value": {"clip_grad_value": 1e-3, "clip_grad_norm": 0.5},
    "value alone": {"clip_grad_value": 1e-3},
    "adaptive": {"clip_grad_norm": 0.5, "clip": "adaptive", "clip_warmup_steps": 1},
    "decay": {"weight_decay": 0.1},
    "scaled": {"loss_scale": 64.0},
    "whole model": {"blocks": []},
    "micro-batches": {"micro_batch_size": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rule", [lowtide.Lomo, lowtide.AdaLomo])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_same_as_with_whole_gradients(tied, rule, options):
    seen = []
    got, norms, state = trained(True, tied=tied, rule=rule, seen=seen, **options)
    assert seen[0].vocabulary.head and seen[0].vocabulary.embedding is not None
    expected, expected_norms, expected_state = trained(False, tied=tied, rule=rule, **options)
    before = make_model(tied).state_dict()
    assert not torch.allclose(got["lm_head.weight"], before["lm_head.weight"], atol=1e-5)
    assert not torch.allclose(got["model.embed_tokens.weight"], before["model.embed_tokens.weight"], atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("how", ["stochastic", "compensated", "nearest"])
@pytest.mark.parametrize("rule", [lowtide.Lomo, lowtide.AdaLomo])
@pytest.mark.parametrize("native", [True, False], ids=["kernels", "torch"])
def test_bfloat16_rows_round_as_in_the_whole_matrix(rule, how, native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels.native, "takes", lambda tensor: False)
    monkeypatch.setattr(
        loss_module, "_MAX_LOGITS", 64 * 40
    )  # all tokens at once: in parts they are summed up in float32
    options = {"tied": False, "dtype": torch.bfloat16, "rule": rule, "rounding": how}
    got, *_ = trained(True, steps=1, **options)
    expected, *_ = trained(False, steps=1, **options)
    head = got["lm_head.weight"] != expected["lm_head.weight"]
    # Lomo's head is the same arithmetic on the same slices; AdaLomo's sums have another order.
    assert head.float().mean() <= (0.0 if rule is lowtide.Lomo else 0.02)
    # A row that came once has the same gradient; sums over several tokens are float32 here and were 16 bits wide.
    (batch,) = batches(1)
    ids, counts = batch["input_ids"].unique(return_counts=True)
    once = ids[counts == 1]
    name = "model.embed_tokens.weight"
    untouched = torch.ones(VOCAB, dtype=torch.bool)
    untouched[ids] = False
    assert torch.equal(got[name][untouched], make_model(False, torch.bfloat16).state_dict()[name][untouched])
    differ = got[name][once] != expected[name][once]
    assert len(once) > 5 and differ.float().mean() <= (0.0 if rule is lowtide.Lomo else 0.05)


@pytest.mark.parametrize("rule", [lowtide.Lomo, lowtide.AdaLomo])
def test_bfloat16_tied_is_within_its_rounding(rule):
    got, *_ = trained(True, tied=True, dtype=torch.bfloat16, rule=rule, rounding="compensated", steps=1)
    expected, *_ = trained(False, tied=True, dtype=torch.bfloat16, rule=rule, rounding="compensated", steps=1)
    exact, *_ = trained(False, tied=True, rule=rule, steps=1)  # from float32 weights that were not rounded
    name = "lm_head.weight"
    start = make_model(True, torch.bfloat16).state_dict()[name].float()
    moved = (exact[name] - make_model(True).state_dict()[name]).norm()
    assert (got[name].float() - expected[name].float()).norm() < 0.05 * moved
    assert (got[name].float() - start).norm() > 0.5 * moved


def test_noise_of_rows_is_that_of_the_matrix():
    rows = torch.tensor([0, 3, 4, 10])
    for columns in (6, 7):
        whole = noise16(11 * columns, -77, 0, torch.device("cpu")).view(11, columns)[rows].reshape(-1)
        got = torch.cat([noise16_of_rows(rows, columns, -77, at, 5) for at in range(0, 4 * columns - 4, 5)])
        assert torch.equal(got, whole[: len(got)])


class Largest(TorchDispatchMode):
    """The number of elements of the largest floating-point tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        storages = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                new = tensor.untyped_storage()
                if new.data_ptr() not in storages:
                    self.numel = max(self.numel, new.nbytes() // tensor.element_size())
        return found


@pytest.mark.parametrize("slices", [True, False])
@pytest.mark.parametrize("rule", [lowtide.Lomo, lowtide.AdaLomo])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_no_gradient_of_the_whole_matrix_is_made(tied, rule, slices, monkeypatch):
    monkeypatch.setattr(rounding, "CPU_SLICE_NUMEL", 1024)
    model = make_model(tied)
    optimizer = rule(model.parameters(), lr=1e-2)
    engine = lowtide.fuse(model, optimizer, vocabulary_slices=slices)
    (batch,) = batches(1)
    loss = model(**batch).loss
    with Largest() as largest:
        engine.backward(loss)
    assert (largest.numel < VOCAB * HIDDEN // 2) == slices, largest.numel


def test_two_losses_in_one_backward_pass():
    def run(slices):
        model = make_model(False)
        optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
        engine = lowtide.fuse(model, optimizer, vocabulary_slices=slices)
        for first, second in zip(batches(2), batches(2), strict=True):
            engine.backward(model(**first).loss + 0.5 * model(**second).loss)
            optimizer.step()
        return model.state_dict()

    torch.testing.assert_close(run(None), run(False), rtol=1e-5, atol=1e-6)


def test_loss_of_ones_own_and_evaluation_in_between():
    def run(slices):
        model = make_model(True)
        optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
        engine = lowtide.fuse(model, optimizer, vocabulary_slices=slices)
        for batch in batches(2):
            with torch.no_grad():
                model(**batch)
            logits = model(batch["input_ids"]).logits  # the head returns a whole gradient
            engine.backward(logits.square().mean() + model.lm_head.weight.square().sum())
            optimizer.step()
        return model.state_dict()

    torch.testing.assert_close(run(None), run(False), rtol=1e-5, atol=1e-6)


def test_autograd_grad_still_gives_gradients():
    model = make_model(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = lowtide.fuse(model, lowtide.Lomo(model.parameters(), lr=0.05), blocks=[])
    (batch,) = batches(1)
    (grad,) = torch.autograd.grad(model(**batch).loss, [model.lm_head.weight])
    assert torch.equal(model.state_dict()["lm_head.weight"], before["lm_head.weight"])
    engine.remove()
    model(**batch).loss.backward()
    torch.testing.assert_close(grad, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rule", [lowtide.Lomo, lowtide.AdaLomo])
def test_a_gradient_that_is_not_finite_changes_nothing(tied, rule):
    model = make_model(tied)
    optimizer = rule(model.parameters(), lr=0.05)
    engine = lowtide.fuse(model, optimizer, vocabulary_slices=True)
    (batch,) = batches(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = model(**batch).loss
    loss.register_hook(lambda grad: grad * torch.nan)  # the loss itself is finite
    engine.backward(loss)
    optimizer.step()
    assert engine.step_skipped or engine.step_partial
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not optimizer.state[model.lm_head.weight].get("step")
    engine.backward(model(**batch).loss)  # the next step is an ordinary one
    optimizer.step()
    assert not engine.step_skipped
    assert not torch.equal(model.state_dict()["lm_head.weight"], before["lm_head.weight"])


def test_remove_gives_the_model_back():
    model = make_model(False)
    engine = lowtide.fuse(model, lowtide.Lomo(model.parameters(), lr=0.05))
    engine.remove()
    assert "forward" not in model.model.embed_tokens.__dict__
    (batch,) = batches(1)
    model(**batch).loss.backward()
    assert model.lm_head.weight.grad is not None and model.model.embed_tokens.weight.grad is not None


def test_where_slices_cannot_be():
    model = make_model(False)
    with pytest.raises(ValueError, match="vocabulary_slices=True"):
        lowtide.fuse(model, lowtide.PerParameter(torch.optim.SGD, model.parameters(), lr=0.1), vocabulary_slices=True)
    engine = lowtide.fuse(model, lowtide.PerParameter(torch.optim.SGD, model.parameters(), lr=0.1))
    assert not engine.vocabulary.head and engine.vocabulary.embedding is None
    engine.remove()
    adalomo = lowtide.fuse(model, lowtide.AdaLomo(model.parameters(), lr=1e-3))
    assert not adalomo.vocabulary.head and adalomo.vocabulary.embedding is not None
    adalomo.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int32_ids(dtype):
    model = make_model(False, dtype)
    optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
    engine = lowtide.fuse(model, optimizer)
    (batch,) = batches(1)
    before = model.model.embed_tokens.weight.clone()
    engine.backward(model(input_ids=batch["input_ids"].int(), labels=batch["labels"]).loss)
    assert not torch.equal(model.model.embed_tokens.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_loss_from_before_the_last_step_is_refused(tied, dtype):
    model = make_model(tied, dtype)
    optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
    engine = lowtide.fuse(model, optimizer, blocks=[])
    first, second = (model(**batch).loss for batch in batches(2))
    engine.backward(first)
    optimizer.step()
    before = model.lm_head.weight.clone()
    with pytest.raises(RuntimeError, match=r"before the last step|inplace operation"):
        engine.backward(second)
    assert torch.equal(model.lm_head.weight, before)


def test_a_head_that_is_replaced_after_fuse_is_refused():
    model = make_model(False)
    lowtide.fuse(model, lowtide.Lomo(model.parameters(), lr=0.05))
    model.resize_token_embeddings(VOCAB + 10)
    (batch,) = batches(1)
    with pytest.raises(RuntimeError, match="fuse the model again"):
        model(**batch)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["rows held", "all waits"])
def test_nothing_of_the_forward_pass_waits_but_hidden_states(weight_decay):
    model = make_model(True)
    engine = lowtide.fuse(model, lowtide.Lomo(model.parameters(), lr=0.05, weight_decay=weight_decay))
    (batch,) = batches(1)
    intake = engine._slots[model.lm_head.weight].intake
    seen = []
    model.model.layers[1].register_full_backward_pre_hook(lambda *_: seen.append((list(intake.waiting), intake.held)))
    engine.backward(model(**batch).loss)
    ((waiting, held),) = seen
    if weight_decay:
        assert held is None and len(waiting) == 1 and waiting[0].grad_hidden is None
    else:
        assert not waiting and held._gradient is None
        assert held.grad.shape == (batch["input_ids"].unique().numel(), HIDDEN)
    assert intake.held is None


def with_and_without_holding(monkeypatch, run):
    """The same run where rows of the batch's tokens are held, and where the whole gradient waits for the embedding's."""
    held = run()
    monkeypatch.setattr(engine_module, "count_edges", lambda loss, params: dict.fromkeys(params, 0))
    return held, run()


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.5}], ids=["plain", "exact"])
@pytest.mark.parametrize("how", [None, "stochastic", "compensated", "nearest"])
def test_rows_that_are_held_get_the_same_bits(how, options, monkeypatch):
    dtype = torch.float32 if how is None else torch.bfloat16
    made = []
    original = loss_module._HeadGradient._visit

    def counted(gradient, *args, **kwargs):
        made.append(1)
        return original(gradient, *args, **kwargs)

    monkeypatch.setattr(loss_module._HeadGradient, "_visit", counted)

    def run():
        made.clear()
        found = trained(None, tied=True, dtype=dtype, rounding=how, **options)
        return *found, len(made)

    (got, norms, state, few), (expected, expected_norms, expected_state, many) = with_and_without_holding(
        monkeypatch, run
    )
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    assert norms == expected_norms
    assert state.keys() == expected_state.keys() and all(
        torch.equal(state[name], expected_state[name]) for name in state
    )
    assert many == 2 * few > 0  # the head's products, once less in each pass


def penalty_first(model, batch):
    penalty = model.lm_head.weight.square().sum()
    return penalty + model(**batch).loss


def penalty_last(model, batch):
    return model(**batch).loss + model.lm_head.weight.square().sum()


def second_head(model, batch):
    """An early exit."""
    seen = []
    norm, head = model.model.norm, model.lm_head
    hook = model.model.layers[0].register_forward_hook(lambda _, __, output: seen.append(head(norm(output))))
    loss = model(**batch).loss
    hook.remove()
    return loss + 0.1 * seen[0].square().mean()


def second_head_computed_again(model, batch):
    embedded = model.get_input_embeddings()(batch["input_ids"])
    hidden = model.model(inputs_embeds=embedded).last_hidden_state
    logits = torch.utils.checkpoint.checkpoint(model.lm_head, hidden, use_reentrant=False)
    return 0.1 * logits.square().mean() + model(inputs_embeds=embedded, labels=batch["labels"]).loss


@pytest.mark.parametrize("loss_of", [penalty_first, penalty_last, second_head, second_head_computed_again])
def test_a_tied_matrix_that_the_loss_uses_once_more(loss_of):
    def run(slices):
        model = make_model(True).double()
        optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
        engine = lowtide.fuse(model, optimizer, vocabulary_slices=slices)
        for batch in batches(2):
            engine.backward(loss_of(model, batch))
            optimizer.step()
        return model.state_dict()

    torch.testing.assert_close(run(None), run(False), rtol=1e-6, atol=1e-7)


def test_rows_are_not_held_where_a_second_graph_uses_the_matrix(monkeypatch):
    holds = []
    original = slices_module.HeldRows.__init__

    def counted(held, *args):
        holds.append(1)
        original(held, *args)

    monkeypatch.setattr(slices_module.HeldRows, "__init__", counted)
    model = make_model(True)
    optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
    engine = lowtide.fuse(model, optimizer)
    first, second = batches(2)
    engine.backward(model(**first).loss + model(**second).loss)
    optimizer.step()
    assert not holds
    engine.backward(model(**first).loss)
    optimizer.step()
    assert holds == [1]
    many = {name: torch.arange(VOCAB)[None] for name in ("input_ids", "labels")}  # every row is touched
    engine.backward(model(**many).loss)
    optimizer.step()
    assert holds == [1]


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.3}], ids=["plain", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_held_or_streamed_are_the_same_bits(dtype, options, tmp_path):
    def run(weights):
        model = make_model(True, dtype)
        optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
        engine = lowtide.fuse(model, optimizer, weights=weights, **options)
        norms = []
        for batch in batches(5):
            engine.backward(model(**batch).loss)
            norms.append(engine.grad_norm)
            optimizer.step()
        state = {name: value.clone() for name, value in engine.state_dict_of_model().items()}
        engine.remove()
        return state, norms

    (got, norms), (expected, expected_norms) = run("device"), run(tmp_path / "weights")
    assert norms == expected_norms
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
