"""Adapters of peft in a fused model: the same weights as with an ordinary backward pass and an optimizer for each kind."""

import builtins
import sys

import pytest
import torch
from model_helpers import one_line, tiny_tokenizer
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

import lowtide
from helpers import TOLERANCE, Snapshot, largest_difference, same_weights, tiny_batch, tiny_model, twin
from lowtide.models import ChunkedLoss, add_lora, causal_lm_loss, load_model, save_model
from lowtide.models.lora import adapted_layers, bare_model

BASE_LR, ADAPTER_LR, NUM_STEPS = 0.05, 1e-2, 6
FAMILIES = ["llama", "qwen3", "gemma3", "gpt_neox", "gpt2", "mixtral"]


def with_adapters(family="llama", train_base=True, dtype=torch.float32, seed=1, options=None, **changes):
    """A tiny model with adapters that are the same at every call."""
    model = tiny_model(family, dtype, **changes)
    torch.manual_seed(seed)
    return add_lora(model, **({"rank": 4, "train_base": train_base} | (options or {})))


def two_optimizers(adapters):
    """Of torch: the reference, which knows nothing of lowtide."""
    made = [torch.optim.AdamW(adapters.parameters(), lr=ADAPTER_LR, weight_decay=0.1)]
    if adapters.train_base:
        made.append(torch.optim.SGD(adapters.base_parameters(), lr=BASE_LR))
    return made


def two_fused(adapters):
    made = [lowtide.PerParameter(torch.optim.AdamW, adapters.parameters(), lr=ADAPTER_LR, weight_decay=0.1)]
    if adapters.train_base:
        made.append(lowtide.Lomo(adapters.base_parameters(), lr=BASE_LR))
    return made


def train(adapters, fused=False, max_norm=None, num_steps=NUM_STEPS, model=None, **options):
    """Some steps; returns the norms of the gradient over base and adapters together."""
    model = model or adapters.model
    optimizers = two_fused(adapters) if fused else two_optimizers(adapters)
    engine = lowtide.fuse(model, optimizers, clip_grad_norm=max_norm, **options) if fused else None
    norms = []
    for step in range(num_steps):
        torch.manual_seed(step)  # dropout
        loss = model(**tiny_batch(step)).loss
        if engine is not None:
            engine.backward(loss)
            norms.append(engine.grad_norm)
        else:
            loss.backward()
            params = [param for param in adapters.model.parameters() if param.requires_grad]
            norms.append(float(nn.utils.clip_grad_norm_(params, max_norm or 1e9)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if engine is not None:
        engine.remove()
    return norms


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_and_lomo_in_one_backward_are_two_optimizers_of_torch(family):
    """The same arithmetic in the same order, so the same bits."""
    reference, fused = with_adapters(family), with_adapters(family)
    before, adapters_before = Snapshot(reference.model), [p.detach().clone() for p in fused.parameters()]
    train(reference)
    train(fused, fused=True, chunked_loss=False)
    assert same_weights(reference.model, fused.model)
    frozen = [name for name, param in fused.model.named_parameters() if not param.requires_grad]
    assert frozen == []
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), fused.model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    assert all(not torch.equal(a, b) for a, b in zip(adapters_before, fused.parameters(), strict=True))
    assert all(adapter_param.abs().sum() > 0 for adapter_param in fused.parameters())  # B began at zero


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("max_norm", [None, 0.2])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_micro_batches_and_clipping_over_base_and_adapters(family, max_norm, micro_batch_size):
    reference, fused = with_adapters(family), with_adapters(family)
    norms = train(reference, max_norm=max_norm)
    fused_norms = train(fused, fused=True, max_norm=max_norm, micro_batch_size=micro_batch_size)
    assert max_norm is None or min(norms) > 2 * max_norm  # so that clipping does something
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(fused_norms), rtol=1e-5, atol=0)
    # AdamW divides by the root of the gradient's square, which multiplies differences of small gradients: the adapters' rate
    # bounds what a step can be off by, and the base sees it through them.
    base = zip(reference.base_parameters(), fused.base_parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in base) < TOLERANCE[torch.float32]
    added = zip(reference.parameters(), fused.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in added) < 20 * TOLERANCE[torch.float32]


def test_lora_alone_leaves_the_base_as_it_is_bit_for_bit():
    reference, fused = with_adapters(train_base=False), with_adapters(train_base=False)
    original = tiny_model()
    train(reference, max_norm=0.2)
    train(fused, fused=True, max_norm=0.2, micro_batch_size=3)
    assert fused.base_parameters() == []
    for name, param in original.named_parameters():
        layer, _, leaf = name.rpartition(".")
        module = fused.model.get_submodule(layer)
        assert torch.equal(param, getattr(getattr(module, "base_layer", module), leaf)), name
    assert largest_difference(reference.model, fused.model) < 20 * TOLERANCE[torch.float32]
    added = zip(with_adapters(train_base=False).parameters(), fused.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in added)


def test_lora_alone_without_clipping_is_adamw_bit_for_bit():
    reference, fused = with_adapters(train_base=False), with_adapters(train_base=False)
    train(reference)
    train(fused, fused=True, chunked_loss=False)
    assert same_weights(reference.model, fused.model)


@pytest.mark.parametrize("max_norm", [None, 0.2])
def test_dropout_of_adapters_is_the_same_in_the_recompute(max_norm):
    options = {"rank": 4, "train_base": True, "dropout": 0.5}
    reference, fused = with_adapters(options=options), with_adapters(options=options)
    plain = with_adapters()
    train(reference, max_norm=max_norm)
    train(fused, fused=True, max_norm=max_norm, chunked_loss=False)
    train(plain, max_norm=max_norm)
    assert largest_difference(reference.model, fused.model) < 20 * TOLERANCE[torch.float32]
    assert largest_difference(reference.model, plain.model) > 1e-3  # dropout did something


def test_the_wrapper_of_peft_can_be_fused_and_called():
    inner, wrapped = with_adapters(), with_adapters()
    train(inner, fused=True, micro_batch_size=3)
    train(wrapped, fused=True, micro_batch_size=3, model=wrapped.peft_model)
    assert same_weights(inner.model, wrapped.model)


def test_the_head_is_seen_through_the_wrapper():
    adapters = with_adapters()
    assert bare_model(adapters.peft_model) is adapters.model and bare_model(adapters.model) is adapters.model
    loss = ChunkedLoss.of(adapters.peft_model)
    assert loss is not None and loss.model is adapters.model
    batch = tiny_batch()
    expected = adapters.model(**batch).loss
    torch.testing.assert_close(causal_lm_loss(adapters.peft_model, **batch), expected)
    engine = lowtide.fuse(adapters.peft_model, two_fused(adapters))
    output = adapters.peft_model(**batch)
    assert output.logits is None and engine.model is adapters.model
    torch.testing.assert_close(output.loss, expected)
    engine.remove()


def test_a_wrapper_with_parameters_of_its_own_is_left_alone():
    from peft import PromptTuningConfig, get_peft_model

    wrapper = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert bare_model(wrapper) is wrapper


def test_an_adapter_on_the_head_keeps_the_loss_of_the_model():
    options = {"rank": 4, "targets": ["lm_head"], "train_base": True}
    reference, fused = (with_adapters(options=options, tie_word_embeddings=False) for _ in range(2))
    assert ChunkedLoss.of(fused.model) is None
    train(reference)
    train(fused, fused=True)
    assert same_weights(reference.model, fused.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_unmerged(family):
    adapters = with_adapters(family)
    plain_names = {name for name, _ in tiny_model(family).named_parameters()}
    train(adapters)
    model = adapters.model.eval()
    batch = {name: tiny_batch()[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        unmerged = model(**batch).logits
        without = twin(model)
        for layer in adapted_layers(without).values():
            layer.enable_adapters(False)
        assert (without(**batch).logits - unmerged).abs().max() > 1e-3  # the adapters do something
        assert adapters.share_lost_by_merging() is None
        assert adapters.merge() is model
        merged = model(**batch).logits
    assert (merged - unmerged).abs().max() < 1e-5
    assert {name for name, _ in model.named_parameters()} == plain_names
    assert adapted_layers(model) == {} and adapters.parameters() == []


def test_a_merged_model_opens_in_plain_transformers(tmp_path):
    adapters = with_adapters()
    train(adapters, fused=True, micro_batch_size=3)
    model = adapters.merge().eval()
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert same_weights(model, opened)
    assert not list((tmp_path / "model").glob("adapter*"))


def test_merging_16_bit_weights_rounds_once_and_says_what_is_lost(caplog):
    adapters = with_adapters(dtype=torch.bfloat16)
    assert {param.dtype for param in adapters.parameters()} == {torch.float32}
    assert {param.dtype for param in adapters.base_parameters()} == {torch.bfloat16}
    assert adapters.share_lost_by_merging() is None  # B is zero
    layer = adapters.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B.default.weight.normal_(std=1e-3)
    weight = layer.base_layer.weight.detach().clone()
    exact = weight.float() + layer.get_delta_weight("default").detach()
    share = adapters.share_lost_by_merging()
    with caplog.at_level("WARNING", "lowtide"):
        model = adapters.merge()
    merged = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(merged, exact.to(torch.bfloat16))
    assert share == (merged == weight).float().mean().item() and 0.01 < share < 0.99
    assert f"{100 * share:.0f} % of the changes" in caplog.text


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_own_weights_and_adapters_are_saved_and_come_back(family, tmp_path):
    adapters = with_adapters(family)
    train(adapters)
    save_model(adapters.model, tiny_tokenizer(), tmp_path / "base")
    adapters.save(tmp_path / "base" / "adapter", "some/model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    names = {name for name, _ in tiny_model(family).named_parameters()}
    assert {name for name, _ in opened.named_parameters()} == names
    with_peft = PeftModel.from_pretrained(opened, tmp_path / "base" / "adapter")
    assert with_peft.peft_config["default"].base_model_name_or_path == "some/model"
    assert same_weights(with_peft, adapters.model)
    # and into a model that has adapters
    again = with_adapters(family, seed=2)
    assert not same_weights(again.model, adapters.model)
    again.load(tmp_path / "base" / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), adapters.parameters(), strict=True))
    # load_model merges what lies beside the weights, or leaves it out
    expected = adapters.merge()
    loaded = load_model(str(tmp_path / "base"), dtype=torch.float32)
    assert same_weights(loaded, expected)
    assert all(param.requires_grad for param in loaded.parameters())
    bare = load_model(str(tmp_path / "base"), dtype=torch.float32, merge_adapters=False)
    assert not same_weights(bare, expected)


def test_saving_does_not_need_the_hub(tmp_path, monkeypatch):
    adapters = with_adapters()
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *_: pytest.fail("asked the hub"))
    adapters.save(tmp_path, "some/model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("fails", [False, True])
def test_saving_leaves_a_readme_as_it_is(tmp_path, monkeypatch, fails):
    notes = "My notes, \xfcber alles.\r\n".encode("latin-1")
    (tmp_path / "README.md").write_bytes(notes)
    adapters = with_adapters()
    if fails:
        monkeypatch.setattr("peft.peft_model.safe_save_file", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapters.save(tmp_path)
    else:
        adapters.save(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == notes
    assert "create_or_update_model_card" not in vars(adapters.peft_model)


@pytest.mark.parametrize(
    ("family", "targets", "adapted"),
    [
        ("llama", None, {"q_proj", "v_proj"}),
        ("gpt2", None, {"c_attn"}),
        ("gpt_neox", None, {"query_key_value"}),
        ("granite", None, {"q_proj", "v_proj"}),  # peft has no default for it
        ("llama", ["mlp.up_proj", "o_proj"], {"up_proj", "o_proj"}),
        ("llama", ["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_targets(family, targets, adapted):
    adapters = add_lora(tiny_model(family), rank=2, targets=targets)
    layers = adapted_layers(adapters.model)
    assert {name.rpartition(".")[2] for name in layers} == adapted
    assert len(layers) == 3 * len(adapted)
    assert all(layer.scaling["default"] == 16 / 2 for layer in layers.values())


@pytest.mark.parametrize("training", [True, False])
def test_adapters_are_in_the_mode_of_the_model(training):
    adapters = add_lora(tiny_model().train(training), rank=2, dropout=0.5)
    assert {module.training for module in adapters.model.modules()} == {training}


def test_what_was_frozen_stays_frozen():
    model = tiny_model(tie_word_embeddings=False)
    model.model.embed_tokens.requires_grad_(False)
    adapters = add_lora(model, rank=2, train_base=True)
    assert not model.model.embed_tokens.weight.requires_grad
    assert len(adapters.base_parameters()) == len(list(tiny_model(tie_word_embeddings=False).parameters())) - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1 and at most 32, the smaller side of model.layers.0.self_attn.q_proj, got 0"),
        ({"rank": 17}, "rank must be at least 1 and at most 16, the smaller side of model.layers.0.self_attn.v_proj, got 17"),
        ({"alpha": 0}, "alpha must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1, got 1.0"),
        ({"dropout": float("nan")}, "dropout must be at least 0"),
        ({"targets": ["q_prj"]}, r"no layer of the model is named 'q_prj' \(did you mean q_proj\?\), .* layers are down_proj, gate_proj"),
        ({"targets": ["xyzzy"]}, "no layer of the model is named 'xyzzy', so"),
        ({"targets": []}, "targets must name at least one layer"),
        ({"targets": ["self_attn"]}, "self_attn is a LlamaAttention, and adapters go on linear layers only"),
        ({"targets": ["embed_tokens"]}, "embed_tokens is a Embedding, and adapters go on linear"),
        ({"targets": ["lm_head"]}, "lm_head shares its weight with another module"),
    ],
)  # fmt: skip
def test_refuses_and_changes_nothing(options, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message) as error:
        add_lora(model, **{"rank": 4, **options})
    one_line(error)
    assert adapted_layers(model) == {} and all(param.requires_grad for param in model.parameters())


def test_refuses_a_second_time_and_what_is_fused():
    adapters = with_adapters()
    with pytest.raises(ValueError, match="has adapters already: merge them first"):
        add_lora(adapters.model, rank=2)
    engine = lowtide.fuse(adapters.model, two_fused(adapters))
    with pytest.raises(RuntimeError, match="cannot be merged: call engine.remove"):
        adapters.merge()
    with pytest.raises(RuntimeError, match="is fused: add adapters before fuse"):
        add_lora(adapters.model, rank=2)
    engine.remove()
    adapters.merge()
    assert len(add_lora(adapters.model, rank=2).parameters()) == 12


def test_refuses_weights_that_live_elsewhere(tmp_path):
    adapters = with_adapters()
    with pytest.raises(ValueError, match="adapters of peft must live where it is computed: use weights='device'"):
        lowtide.fuse(adapters.model, two_fused(adapters), weights=tmp_path / "weights")
    train(adapters, fused=True, weights="cpu", num_steps=1)  # on a CPU the same as "device"


def test_refuses_other_adapters(tmp_path):
    adapters = with_adapters()
    with pytest.raises(FileNotFoundError, match=r"no adapters in .*: it has no adapter_model.safetensors"):
        adapters.load(tmp_path)
    add_lora(tiny_model(), rank=2).save(tmp_path / "rank")
    with pytest.raises(ValueError, match="not those of this model and rank"):
        adapters.load(tmp_path / "rank")
    for name, targets in (("fewer", ["q_proj"]), ("more", ["q_proj", "k_proj", "v_proj"])):
        add_lora(tiny_model(), rank=4, targets=targets).save(tmp_path / name)
        with pytest.raises(ValueError, match=r"these targets: the first that differs is .*\.(v|k)_proj\.lora_A"):
            adapters.load(tmp_path / name)


def test_without_peft_it_says_what_to_install(monkeypatch, tmp_path):
    original = builtins.__import__

    def no_peft(name, *args, **kwargs):
        if name.partition(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        return original(name, *args, **kwargs)

    with_adapters().save(tmp_path / "base" / "adapter")
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    (tmp_path / "base" / "adapter").rename(tmp_path / "model" / "adapter")
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", no_peft)
    with pytest.raises(ModuleNotFoundError, match=r"LoRA needs the package peft: pip install 'lowtide\[lora\]'"):
        add_lora(tiny_model(), rank=2)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lowtide\[lora\]'"):
        load_model(str(tmp_path / "model"), dtype=torch.float32)
