import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowtide.planning import KINDS, Sharding, rank_shape, sharded_footprint, sharded_time, tracing
from lowtide.planning.sharded_time import Link
from lowtide.planning.speeds import NAMES, Speeds
from lowtide.planning.tracing import ALLOCATOR, GATHERED, GRADIENTS, SENT, STATE, WEIGHTS

FAMILIES = ["llama", "qwen3", "gemma3", "gpt_neox", "gpt2", "mixtral", "qwen3_moe"]
# Layers that outweigh the embedding, and the embedding that outweighs layers.
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "tie_word_embeddings": False}
LARGE_VOCABULARY = {"vocab_size": 20000, "tie_word_embeddings": False}


def total(footprint, place="device"):
    return footprint.totals()[place]


def test_one_rank_is_the_ordinary_step(tiny_shape):
    shape = tiny_shape(batch_size=8)
    for size in (None, 2):
        assert sharded_footprint(shape, 1, micro_batch_size=size) == shape.footprint(micro_batch_size=size)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("clipped", [False, True])
def test_every_rank_has_its_rows_and_all_is_counted(tiny_shape, family, device, clipped):
    shape = tiny_shape(family, batch_size=8, device=device, exact_clipping=clipped)
    for num_ranks in (2, 4, 8):
        found = sharded_footprint(shape, num_ranks, micro_batch_size=1)
        assert set(found.device) <= set(KINDS)
        # rows that do not divide are padded: at most one row more of each parameter
        rows = sum(param[0].nbytes for param in shape.model.parameters())
        assert shape.weights_bytes / num_ranks <= found.device[WEIGHTS] <= shape.weights_bytes / num_ranks + rows
        assert found.host == found.disk == {}
    assert (ALLOCATOR in found.device) <= (device == "cpu")


def test_more_ranks_never_take_more_memory_each(tiny_shape):
    for device in ("cpu", "cuda"):
        shape = tiny_shape(changes=WIDE, batch_size=16, seq_len=32, device=device)
        totals = [total(sharded_footprint(shape, num_ranks, micro_batch_size=1)) for num_ranks in (2, 4, 8, 16)]
        assert totals == sorted(totals, reverse=True)
        assert totals[0] > totals[-1]


def test_what_does_not_shrink_is_the_largest_unit(tiny_shape):
    shape = tiny_shape(changes=WIDE, batch_size=64, seq_len=4, device="cuda")
    layer = next(unit.num_bytes for unit in shape.units if unit.is_layer)
    found = sharded_footprint(shape, 64).device
    unit = found[GATHERED] + found[SENT] + found[GRADIENTS]
    # its weights and gradients, the next one's gather, and what is sent of the one before it
    assert unit == pytest.approx(4 * layer, rel=0.02)
    assert found[WEIGHTS] == pytest.approx(shape.weights_bytes / 64, rel=0.02)


def test_a_large_vocabulary_decides(tiny_shape):
    shape = tiny_shape(changes=LARGE_VOCABULARY, batch_size=64, seq_len=4, device="cuda")
    vocabulary = max(unit.num_bytes for unit in shape.units)
    found = sharded_footprint(shape, 64).device
    assert found[GATHERED] == pytest.approx(vocabulary, rel=0.01)
    assert found[GRADIENTS] == pytest.approx(vocabulary, rel=0.01)


def test_tied_weights_stay_gathered_through_all_layers_with_their_gradient(tiny_shape):
    vocabulary = 2000 * 256 * 4
    tied, untied = (
        tiny_shape(
            changes={**WIDE, "vocab_size": 2000, "tie_word_embeddings": tied}, batch_size=64, seq_len=4, device="cuda"
        )
        for tied in (True, False)
    )
    assert max(unit.num_bytes for unit in tied.units) > vocabulary  # a layer decides
    tied, untied = (sharded_footprint(shape, 64).device for shape in (tied, untied))
    for kind in (GATHERED, GRADIENTS):
        assert tied[kind] - untied[kind] == pytest.approx(vocabulary, rel=0.05)


def test_sums_of_16_bit_gradients_take_twice_the_room_unless_they_are_sent_as_they_are(tiny_shape):
    shape = tiny_shape(changes=WIDE, batch_size=64, seq_len=4, device="cuda", dtype=torch.bfloat16)
    layer = next(unit.num_bytes for unit in shape.units if unit.is_layer)
    wide, narrow = (sharded_footprint(shape, 64, reduce_dtype=name).device for name in ("auto", "weights"))
    assert wide[SENT] - narrow[SENT] == pytest.approx(layer, rel=0.02)
    in_float32 = tiny_shape(changes=WIDE, batch_size=64, seq_len=4, device="cuda")
    assert sharded_footprint(in_float32, 64) == sharded_footprint(in_float32, 64, reduce_dtype="weights")


def test_micro_batches_add_up_in_float32_and_only_then(tiny_shape):
    largest = 256 * 1024  # elements of a gradient that is added in place
    for dtype, reduce_dtype, more in (
        (torch.float32, "auto", lambda layer: 4 * largest),
        (torch.bfloat16, "weights", lambda layer: 2 * largest),
        (torch.bfloat16, "auto", lambda layer: 2 * layer),  # float32 sums
    ):
        shape = tiny_shape(changes=WIDE, batch_size=16, seq_len=4, device="cuda", dtype=dtype)
        layer = next(unit.num_bytes for unit in shape.units if unit.is_layer)
        whole, split = (
            sharded_footprint(shape, 4, micro_batch_size=size, reduce_dtype=reduce_dtype).device[GRADIENTS]
            for size in (4, 1)
        )
        assert whole == pytest.approx(layer, rel=0.02)
        assert split == pytest.approx(layer + more(layer), rel=0.02)


def test_state_is_shared_but_for_the_column_means_of_adalomo(tiny_shape):
    columns = sum(4 * param.shape[1] for param in tiny_shape().model.parameters() if param.dim() == 2)
    adamw, adalomo = (tiny_shape(optimizer=name, changes=WIDE, batch_size=4) for name in ("adamw", "adalomo"))
    assert sharded_footprint(adamw, 4).device[STATE] == pytest.approx(adamw.state_bytes / 4, rel=0.01)
    columns = sum(4 * param.shape[1] for param in adalomo.model.parameters() if param.dim() == 2)
    expected = columns + (adalomo.state_bytes - columns) / 4
    assert sharded_footprint(adalomo, 4).device[STATE] == pytest.approx(expected, rel=0.01)
    assert STATE not in sharded_footprint(tiny_shape(optimizer="lomo"), 4).device


def test_within_nodes_a_rank_has_the_rows_of_one_in_a_node(tiny_shape):
    shape = tiny_shape(changes=WIDE, batch_size=8, device="cuda")
    nodes, all_ranks = sharded_footprint(shape, 8, ranks_per_node=2), sharded_footprint(shape, 8)
    assert nodes.device[WEIGHTS] == pytest.approx(shape.weights_bytes / 2, rel=0.01)
    assert total(nodes) > total(all_ranks)
    assert sharded_footprint(shape, 8, ranks_per_node=8) == all_ranks


def test_rows_in_host_memory(tiny_shape):
    shape = tiny_shape(changes=WIDE, batch_size=8, device="cuda", optimizer="adamw")
    there, here = sharded_footprint(shape, 4, offload=True), sharded_footprint(shape, 4)
    assert WEIGHTS not in there.device and STATE not in there.device
    assert there.host[WEIGHTS] == here.device[WEIGHTS]
    assert there.host[STATE] == here.device[STATE]
    assert total(there) < total(here)
    on_cpu = tiny_shape(batch_size=8)
    assert sharded_footprint(on_cpu, 4, offload=True) == sharded_footprint(on_cpu, 4)


def test_the_rank_with_the_most_rows_of_the_batch_counts(tiny_shape):
    shape = tiny_shape(batch_size=9)
    assert rank_shape(shape, Sharding(4)).batch_size == 3
    assert sharded_footprint(shape, 4) == sharded_footprint(tiny_shape(batch_size=12), 4)


def test_what_cannot_be_divided_is_refused(tiny_shape):
    shape = tiny_shape(batch_size=4)
    for wrong, words in (
        ({"num_ranks": 8}, "4 cannot be shared by 8"),
        ({"num_ranks": 0}, "at least 1"),
        ({"num_ranks": 4, "ranks_per_node": 3}, "cannot be divided into groups of 3"),
        ({"num_ranks": 4, "reduce_dtype": "float16"}, "reduce_dtype must be"),
    ):
        with pytest.raises(ValueError, match=words):
            sharded_footprint(shape, **wrong)


def test_a_model_that_cannot_be_traced_is_estimated(tiny_shape, monkeypatch, caplog):
    from lowtide.planning import step_shape

    def broken(*args, **kwargs):
        raise NotImplementedError("no meta kernel")

    options = {"changes": WIDE, "batch_size": 8, "device": "cuda", "dtype": torch.bfloat16}
    expected = total(sharded_footprint(tiny_shape(**options), 2, micro_batch_size=1))
    monkeypatch.setattr(step_shape, "trace_block", broken)
    found = total(sharded_footprint(tiny_shape(**options), 2, micro_batch_size=1))
    assert "estimated instead" in caplog.text
    assert found == pytest.approx(expected, rel=0.3)


REAL = """
import json, sys
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as module
sys.path.insert(0, sys.argv[1])
import lowtide
from helpers import tiny_batch, tiny_model
from lowtide.optim.shards import local_part

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
moved = {"foreach_all_gather": 0, "foreach_reduce": 0}

def counted(name, itemsize):
    original = getattr(module, name)
    def call(params, *args, **kwargs):
        moved[name] += sum(4 * param.padded_sharded_param_size.numel() * itemsize for param in params)
        return original(params, *args, **kwargs)
    setattr(module, name, call)

counted("foreach_all_gather", 2)
counted("foreach_reduce", 4)
model = lowtide.shard(tiny_model(sys.argv[2], torch.bfloat16, tie_word_embeddings=sys.argv[3] == "tied"))
rows = sum(local_part(param).nbytes for param in model.parameters())
model(**tiny_batch()).logits.float().sum().backward()
print(json.dumps([rows, moved["foreach_all_gather"], moved["foreach_reduce"]]))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_nothing_is_kept_but_gradients_are_copied_where_they_are_converted(tiny_shape, monkeypatch, dtype):
    monkeypatch.setitem(tracing.HEAP_BELOW, "cpu", 0)  # all of a tiny model comes from the heap, whose gaps outweigh it
    shape = tiny_shape(changes=WIDE, batch_size=64, seq_len=4, dtype=dtype)
    layer = next(unit.num_bytes for unit in shape.units if unit.is_layer)
    found = sharded_footprint(shape, 64).device
    # float32: weights and gradients, or gradients and what is sent. bfloat16: gradients, joined, and in float32
    expected = 2 if dtype == torch.float32 else 4
    assert sum(found.get(kind, 0) for kind in (GATHERED, SENT, GRADIENTS)) == pytest.approx(expected * layer, rel=0.02)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen3_moe", False)])
def test_rows_and_traffic_are_those_of_a_model_that_is_sharded(tiny_shape, family, tied):
    command = [sys.executable, "-c", REAL, str(Path(__file__).parents[1]), family, "tied" if tied else "not"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, gathered, sent = json.loads(done.stdout.splitlines()[-1])
    shape = tiny_shape(family, {"tie_word_embeddings": tied}, dtype=torch.bfloat16, batch_size=8, seq_len=10)
    assert sharded_footprint(shape, 4).device[WEIGHTS] == rows
    sharding = Sharding(4)
    speeds = Speeds(1e9, 1e9, 1e9, 1e9, 1e9, dict.fromkeys(NAMES, "given"))
    time = sharded_time(rank_shape(shape, sharding), sharding, speeds, Link(1e9, 1e9, "given"))
    # of four parts three come from others; the final norm belongs to no unit
    assert time.gather_bytes == pytest.approx(gathered * 3 / 4, rel=0.01)
    assert time.scatter_bytes == pytest.approx(sent * 3 / 4, rel=0.01)
