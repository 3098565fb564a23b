import logging

import pytest
import torch

from helpers import tiny_config
from lowtide.models import find_blocks
from lowtide.planning import StepShape, compare, footprint, step_shape
from lowtide.planning.tracing import ALLOCATOR, KEPT, KINDS, POOLS, STATE, WEIGHTS
from lowtide.weights import home, staging
from lowtide.weights.layout import PAGE_BYTES

GIB = 2**30
FAMILIES = [
    "llama", "qwen3", "gemma2", "gemma3", "gpt_neox", "gpt2", "qwen3_moe", "mixtral", "cohere", "granite",
]  # fmt: skip


def test_the_paper_s_table_of_llama_7b(llama_7b):
    by_name = {method.name: method for method in compare(llama_7b)}
    adamw, sgd, lomo = (
        by_name[name] for name in ("AdamW, mixed precision (paper)", "SGD, float32 master (paper)", "LOMO (paper)")
    )
    found = [[round(part / GIB, 2) for part in (m.weights, m.gradients, m.state)] for m in (adamw, sgd, lomo)]
    assert found == [[12.55, 12.55, 75.31], [12.55, 12.55, 25.1], [12.55, 0.24, 0.0]]
    assert lomo.activations / GIB == pytest.approx(1.79, rel=0.1)  # with checkpointing
    for method, total in ((adamw, 102.20), (sgd, 51.99), (lomo, 14.58)):
        assert method.total / GIB == pytest.approx(total, rel=0.02)


def test_lowtide_takes_no_more_than_the_paper_s_lomo(llama_7b):
    assert sum(llama_7b.footprint().device.values()) / GIB == pytest.approx(14.58, rel=0.02)


def test_state_of_the_optimizers(tiny_shape):
    count = tiny_shape().num_parameters
    assert tiny_shape(optimizer="lomo").state_bytes == 0
    num_params = len(list(tiny_shape().model.parameters()))
    assert tiny_shape(optimizer="adamw").state_bytes == 8 * count + 4 * num_params
    assert 0 < tiny_shape(optimizer="adalomo").state_bytes < 4 * count / 4
    compensated = tiny_shape(optimizer="lomo", dtype=torch.bfloat16, rounding="compensated")
    assert compensated.state_bytes == 2 * count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [False, True])
def test_every_architecture_can_be_traced(tiny_shape, family, masked, caplog):
    shape = tiny_shape(family, masked=masked, exact_clipping=masked)
    with caplog.at_level(logging.WARNING, logger="lowtide"):
        found = shape.footprint(micro_batch_size=2).device
    ours = [record for record in caplog.records if record.name.startswith("lowtide")]
    assert not ours  # nothing was estimated
    assert set(found) <= set(KINDS)
    hidden = 4 * 4 * 16 * 32
    assert shape.step.input_bytes == hidden
    assert 3 * hidden <= shape.step.kept_bytes < 5 * hidden  # three layers, and what they share


def test_a_mask_is_kept_and_more_heads_are_copied(tiny_shape):
    plain, masked = (tiny_shape(masked=masked, seq_len=64) for masked in (False, True))
    assert masked.step.kept_bytes - plain.step.kept_bytes == 4 * 64 * 64
    working = [shape.working_sets(4)[0].backward for shape in (plain, masked)]
    assert sum(working[1].values()) > sum(working[0].values())


def test_what_is_kept_grows_with_the_batch_and_with_the_sequence(tiny_shape):
    one, more = tiny_shape(batch_size=2).step, tiny_shape(batch_size=8).step
    assert more.input_bytes == 4 * one.input_bytes
    longer = tiny_shape(batch_size=2, seq_len=64).step
    assert longer.input_bytes == 4 * one.input_bytes


def test_micro_batches_need_less_memory_where_activations_outweigh_gradients(tiny_shape):
    shape = tiny_shape(changes={"intermediate_size": 512}, batch_size=16, seq_len=512, device="cuda")
    totals = [sum(shape.footprint(micro_batch_size=size).device.values()) for size in (16, 4, 1)]
    assert totals[0] > totals[1] > totals[2]


def test_no_micro_batch_is_the_whole_batch(tiny_shape):
    shape = tiny_shape()
    assert shape.footprint() == shape.footprint(micro_batch_size=4) == shape.footprint(micro_batch_size=100)


def test_exact_clipping_keeps_all_inputs_until_the_second_pass(tiny_shape):
    shape = tiny_shape(exact_clipping=True, device="cuda")
    phases = [(moment.phase, moment.block) for moment in shape.step.moments]
    assert phases == [
        *(("forward", block) for block in range(3)),
        *((phase, block) for phase in ("measure", "backward") for block in (2, 1, 0)),
    ]
    kept = {(moment.phase, moment.block): moment.live.get(KEPT, 0) for moment in shape.step.moments}
    assert kept["measure", 0] == kept["measure", 2] > kept["backward", 0]
    plain = tiny_shape(device="cuda").footprint()
    assert sum(shape.footprint().device.values()) >= sum(plain.device.values())


def test_a_streamed_model_has_a_pool_in_place_of_its_weights(tiny_shape):
    shape = tiny_shape(changes={"tie_word_embeddings": False}, device="cuda")
    host, disk = shape.footprint("host"), shape.footprint("disk")
    outside = 32 * 4  # the final norm
    assert host.device[WEIGHTS] == disk.device[WEIGHTS] == outside
    assert host.host[WEIGHTS] == disk.disk[WEIGHTS] == shape.weights_bytes - outside
    layer = max(unit.num_bytes for unit in shape.units)  # larger than embedding and head
    assert host.device[POOLS] == 3 * -(-layer // 4096) * 4096
    assert POOLS not in host.host
    assert disk.host == {POOLS: 4 * 64 * 2**20}


def test_each_home_has_a_pool_of_its_own_size(tiny_shape):
    shape = tiny_shape(changes={"tie_word_embeddings": False, "vocab_size": 5000}, device="cuda")
    homes = {unit.name: "disk" if unit.is_layer else "device" for unit in shape.units}
    layer = max(unit.num_bytes for unit in shape.units if unit.is_layer)
    found = shape.footprint(homes)
    assert found.device[POOLS] == 3 * -(-layer // 4096) * 4096
    homes["lm_head"] = "host"  # alone there: one buffer is enough
    assert shape.footprint(homes).device[POOLS] == 3 * -(-layer // 4096) * 4096 + -(-5000 * 32 * 4 // 4096) * 4096


def test_a_large_embedding_has_one_large_buffer(tiny_shape):
    for tied in (True, False):
        shape = tiny_shape(changes={"tie_word_embeddings": tied, "vocab_size": 5000}, device="cuda")
        layer, large = (-(-size // 4096) * 4096 for size in sorted({unit.num_bytes for unit in shape.units}))
        assert shape.footprint("host").device[POOLS] == large + 2 * layer


def test_tied_weights_are_one_unit(tiny_shape):
    tied, untied = (tiny_shape(changes={"tie_word_embeddings": tied}) for tied in (True, False))
    assert [unit.name for unit in tied.units] == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3))]
    assert untied.units[-1].name == "lm_head"
    assert sum(unit.num_bytes for unit in tied.units) + 4 * 32 == tied.weights_bytes


def test_on_a_cpu_host_memory_is_the_device_s(tiny_shape):
    shape = tiny_shape()
    assert shape.footprint("host") == shape.footprint("device")
    assert shape.footprint("device").host == {}
    assert shape.footprint(block_inputs="host") == shape.footprint()


def test_block_inputs_in_host_memory(tiny_shape):
    shape = tiny_shape(changes={"num_hidden_layers": 8}, batch_size=16, seq_len=64, device="cuda")
    here, there = shape.footprint(), shape.footprint(block_inputs="host")
    assert there.host[KEPT] == 8 * shape.step.input_bytes
    assert sum(there.device.values()) < sum(here.device.values())


def test_only_a_cpu_keeps_free_memory(tiny_shape):
    assert ALLOCATOR in tiny_shape(device="cpu").footprint().device
    assert ALLOCATOR not in tiny_shape(device="cuda").footprint().device


def test_a_model_that_cannot_be_traced_is_estimated_and_said_so(tiny_shape, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise NotImplementedError("no meta kernel")

    expected = tiny_shape(device="cuda").footprint()
    monkeypatch.setattr(step_shape, "trace_block", broken)
    with caplog.at_level(logging.WARNING, logger="lowtide"):
        found = tiny_shape(device="cuda").footprint()
    assert "LlamaDecoderLayer cannot be traced (no meta kernel): estimated instead" in caplog.text
    assert sum(found.device.values()) == pytest.approx(sum(expected.device.values()), rel=0.5)
    monkeypatch.setattr(step_shape, "trace_step", broken)
    found = tiny_shape(device="cuda", exact_clipping=True).footprint(micro_batch_size=1)
    assert "LlamaForCausalLM cannot be traced (no meta kernel): estimated instead" in caplog.text
    assert sum(found.device.values()) == pytest.approx(sum(expected.device.values()), rel=0.7)


def test_a_smaller_batch_of_the_same_shape(tiny_shape):
    shape = tiny_shape(batch_size=8)
    shape.footprint()
    assert shape.resized(batch_size=2, seq_len=16).footprint() == tiny_shape(batch_size=2).footprint()
    assert shape.footprint() == tiny_shape(batch_size=8).footprint()


def test_tracing_leaves_the_model_alone(tiny_shape):
    shape = tiny_shape()
    shape.footprint(micro_batch_size=1)
    for module in shape.model.modules():
        assert "forward" not in module.__dict__
    assert all(param.grad is None and not param._post_accumulate_grad_hooks for param in shape.model.parameters())


def test_the_same_every_time(tiny_shape):
    assert tiny_shape().footprint(micro_batch_size=2) == tiny_shape().footprint(micro_batch_size=2)


def test_bad_numbers_are_refused(tiny_shape):
    for wrong in ({"batch_size": 0}, {"seq_len": 1}, {"optimizer": "adam"}):
        with pytest.raises(ValueError):
            tiny_shape(**wrong).footprint()


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no blocks were found"):
        StepShape(tiny_config(), find_blocks=lambda model: [], dtype=torch.float32, batch_size=1, seq_len=8)


def test_its_constants_are_those_of_the_homes():
    assert step_shape.STAGING_BYTES == 4 * staging._BUFFER_BYTES
    assert step_shape._TRIM_FROM_BYTES == home.TRIM_FROM_BYTES
    assert step_shape._PAGE == PAGE_BYTES


def test_the_short_way(tiny_shape):
    found = footprint(
        tiny_config(), find_blocks=find_blocks, dtype=torch.float32, batch_size=4, seq_len=16, masked=False
    )
    assert found == tiny_shape().footprint()
    assert STATE not in found.device
    assert found.totals()["device"] == sum(found.device.values())
    assert found.to_dict() == {"device": found.device, "host": {}, "disk": {}}
