"""The choice of attention. Flash attention needs a card, so a plain twin of its two functions stands in for the package."""

import itertools
import signal

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoTokenizer

from lowtide.models import load_model, set_attention
from lowtide.training import TrainConfig, train
from lowtide.training.data import load_data
from lowtide.training.setup import without_cache
from tiny_files import write_jsonl

TEXTS = [{"text": "the tide is low and turns " * n} for n in (1, 2, 1, 3, 1, 2)] * 4


def attend(query, key, value, causal, scale):
    """[T, heads, D] each, one document; several query heads share one of the keys and values."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    found = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=True)
    return found[0].transpose(0, 1)


class Twin:
    """What flash_attn computes, document by document."""

    def __init__(self):
        self.num_documents = []

    def fixed(self, query, key, value, dropout_p=0.0, softmax_scale=None, causal=False, **_):
        rows = [attend(q, k, v, causal, softmax_scale) for q, k, v in zip(query, key, value, strict=True)]
        return torch.stack(rows)

    def varlen(
        self, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, **_,
    ):  # fmt: skip
        assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist()
        bounds = cu_seqlens_q.tolist()
        self.num_documents.append(len(bounds) - 1)
        parts = [attend(query[a:b], key[a:b], value[a:b], causal, softmax_scale) for a, b in itertools.pairwise(bounds)]
        return torch.cat(parts)


@pytest.fixture
def twin(monkeypatch):
    twin = Twin()
    monkeypatch.setattr(flash, "_loaded_implementation", "flash_attention_2")
    monkeypatch.setattr(flash, "_flash_fn", twin.fixed)
    monkeypatch.setattr(flash, "_flash_varlen_fn", twin.varlen)
    monkeypatch.setattr(flash, "_pad_fn", flash._pad_input)
    monkeypatch.setattr(flash, "_unpad_fn", flash._unpad_input)
    monkeypatch.setattr(flash, "_process_flash_kwargs_fn", flash._lazy_define_process_function(twin.varlen))

    def choose(model, name):
        for config in (model.config, model.model.config):
            config._attn_implementation = name

    monkeypatch.setattr("lowtide.training.run.set_attention", choose)
    return twin


@pytest.fixture
def text_config(make_config, tmp_path):
    data = write_jsonl(tmp_path / "texts.jsonl", TEXTS)

    def make(name, **changes):
        settings = {
            "data": [str(data)], "output": str(tmp_path / name), "batch_size": 4, "max_seq_len": 128, "max_steps": 3, "lr": 0.05,
            "optimizer": "lomo",
        }  # fmt: skip
        return make_config(**settings | changes)

    return make


def test_packed_documents_are_kept_apart(text_config, twin):
    losses = {}
    for name, changes in {"sdpa": {"micro_batch_size": 1}, "flash_attention_2": {}}.items():
        losses[name] = []
        config = text_config(name, attention=name, **changes)
        result = train(config, on_event=lambda event, name=name: losses[name].append(event), show_progress=False)
        assert result.num_steps == 3
    assert max(twin.num_documents) > 1
    kinds = ("train", "eval")
    sdpa, with_flash = ([e["loss"] for e in events if e["event"] in kinds] for events in losses.values())
    assert len(sdpa) == 5
    assert with_flash == pytest.approx(sdpa, rel=1e-5)


def test_packed_loss_is_the_padded_one(text_config, twin, model_dir):
    model = load_model(str(model_dir), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    sums = {}
    for packing in (True, False):
        for attention in ("sdpa", "flash_attention_2"):
            for config in (model.config, model.model.config):
                config._attn_implementation = attention
            config = text_config("out", packing=packing, attention=attention, eval_fraction=0, batch_size=1)
            total = count = 0
            with torch.no_grad(), without_cache(model):
                for batch in load_data(config, tokenizer).train.epoch(0):
                    counted = int((batch["labels"] != -100).sum())
                    total += float(model(**batch).loss) * counted
                    count += counted
            sums[packing, attention] = (total / count, count)
    expected = sums[False, "sdpa"]
    for found in sums.values():
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_packed_run_is_resumed(text_config, twin):
    """Its rows go through a layer one at a time, which nobody has set."""
    settings = {"attention": "flash_attention_2", "packing": True, "eval_fraction": 0, "batch_size": 2}
    config = text_config("parts", **settings)

    def interrupt(event):
        if event["event"] == "train" and event["step"] == 1:
            signal.raise_signal(signal.SIGINT)

    assert train(config, on_event=interrupt, show_progress=False).interrupted
    parts = train(TrainConfig(**{**config.to_dict(), "resume": "latest"}), show_progress=False)
    whole = train(text_config("whole", **settings), show_progress=False)
    first, second = (load_file(each.model_dir / "model.safetensors") for each in (parts, whole))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_several_rows_at_once_are_refused_for_packed_sequences(text_config, twin):
    config = text_config("out", attention="flash_attention_2", micro_batch_size=2)
    with pytest.raises(ValueError, match="set micro_batch_size to 1 instead of 2, or packing to false"):
        train(config, show_progress=False)
    assert config.rows_at_once(False) == 2
    assert text_config("out").rows_at_once(True) is None


def test_what_is_not_installed_or_unknown_is_refused(model_dir, make_config):
    model = load_model(str(model_dir), dtype=torch.float32)
    set_attention(model, "eager")
    assert model.config._attn_implementation == "eager"
    for name in ("flash_attention_2", "nonsense"):
        with pytest.raises(ValueError, match=f"attention {name} cannot be used"):
            set_attention(model, name)
    with pytest.raises(ValueError, match="attention"):
        make_config(attention="fast").validate()
