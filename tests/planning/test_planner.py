import json

import pytest
import torch

from lowtide.planning import Limits, Speeds, make_plan, step_shape
from lowtide.planning.planner import micro_batches
from lowtide.planning.speeds import NAMES
from lowtide.planning.tracing import WEIGHTS

HUGE = 10**15
PLENTY = Limits(HUGE, HUGE, HUGE)
SLOW_TRANSFERS = Speeds(1e15, 1e6, 1e6, 1e5, 1e5, dict.fromkeys(NAMES, "given"))
FAST_TRANSFERS = Speeds(1e6, 1e15, 1e15, 1e15, 1e15, dict.fromkeys(NAMES, "given"))


@pytest.fixture
def shape(tiny_shape):
    """A model whose weights outweigh everything else, on a GPU that is not here."""
    changes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "tie_word_embeddings": False}
    return tiny_shape(changes=changes, device="cuda", batch_size=4, seq_len=8)


def plan(shape, limits=PLENTY, speeds=SLOW_TRANSFERS, **options):
    return make_plan(shape, limits=limits, speeds=speeds, **options)


@pytest.fixture
def small_staging(monkeypatch):
    """Buffers between disk and GPU that are small beside the model."""
    monkeypatch.setattr(step_shape, "STAGING_BYTES", 4 * 4096)


def just_too_little(shape):
    """Device memory for which nothing can stay there as a whole."""
    return min(needed(shape, "device", size, i)["device"] for size in (4, 2, 1) for i in ("device", "host")) - 1


def needed(shape, home, size=None, inputs="device"):
    return shape.footprint(home, micro_batch_size=size, block_inputs=inputs).totals()


def test_what_fits_stays_on_the_device_in_one_piece(shape):
    found = plan(shape)
    assert {home for _, home in found.homes} == {"device"}
    assert (found.micro_batch_size, found.block_inputs) == (4, "device")
    assert found.time.bottleneck == "compute"


def test_a_little_too_much_streams_a_few_blocks_from_host_memory(shape):
    found = plan(shape, Limits(just_too_little(shape), HUGE, HUGE))
    homes = [home for _, home in found.homes]
    assert found.count("host") > 0 and found.count("disk") == 0
    assert found.count("device") > 0
    layers = [home for (name, home) in found.homes if "layers" in name]
    assert layers == sorted(layers)  # the first on the device
    assert len(homes) == 8


def test_the_limits_are_kept_and_more_room_is_never_slower(shape):
    lowest = min(needed(shape, "host", 1, inputs)["device"] for inputs in ("device", "host"))
    highest = needed(shape, "device")["device"]
    times = []
    for device in range(lowest, highest + 1_000_000, (highest - lowest) // 7):
        found = plan(shape, Limits(device, HUGE, 0))
        assert found.footprint.totals()["device"] <= device
        times.append(found.time.step_s)
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


def test_what_host_memory_cannot_hold_goes_to_the_disk(tiny_shape, small_staging):
    changes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "tie_word_embeddings": False}
    shape = tiny_shape(changes=changes, device="cuda", batch_size=4, seq_len=8)
    weights = needed(shape, "host")["host"]
    staging = needed(shape, "disk")["host"]
    largest = max(unit.num_bytes for unit in shape.units)
    two_pools = min(needed(shape, "host", size)["device"] for size in (4, 1)) + 3 * largest + 3 * 4096
    found = plan(shape, Limits(two_pools, staging + weights // 2, HUGE))
    assert {home for _, home in found.homes} >= {"host", "disk"}
    assert found.footprint.totals()["host"] <= staging + weights // 2
    assert found.footprint.disk[WEIGHTS] == found.copy_bytes > 0


def test_device_and_host_memory_hold_together_what_neither_holds_alone(shape):
    weights = needed(shape, "host")["host"]
    layer = max(unit.num_bytes for unit in shape.units if unit.is_layer)
    device = min(needed(shape, "host", size)["device"] for size in (4, 1)) + 2 * layer
    found = plan(shape, Limits(device, weights - layer, 0))
    assert found.count("device") >= 1 and found.count("host") >= 1 and found.count("disk") == 0
    totals = found.footprint.totals()
    assert totals["device"] <= device and totals["host"] <= weights - layer


def test_without_host_memory_everything_streams_from_the_disk(shape, small_staging):
    found = plan(shape, Limits(needed(shape, "disk", 1)["device"], needed(shape, "disk")["host"], HUGE))
    assert found.count("host") == 0
    assert found.count("disk") > 0


def test_nothing_goes_to_a_disk_that_is_not_allowed(shape):
    with pytest.raises(MemoryError, match=r"no plan fits: .* of device memory where .* may be used"):
        plan(shape, Limits(1000, 1000, 0))


def test_what_would_fit_is_said(tiny_shape):
    shape = tiny_shape(batch_size=64, seq_len=256)
    room = tiny_shape(batch_size=8, seq_len=256).footprint("disk", micro_batch_size=1).totals()["device"]
    with pytest.raises(MemoryError, match="this would fit: batches of 8"):
        plan(shape, Limits(room, 0, HUGE))
    room = tiny_shape(batch_size=1, seq_len=64).footprint("disk", micro_batch_size=1).totals()["device"]
    with pytest.raises(MemoryError, match="batches of 1 and sequences of 64$"):
        plan(shape, Limits(room, 0, HUGE))


def test_the_disk_is_asked_for_where_it_would_help(shape, small_staging):
    used = needed(shape, "disk", 1)
    with pytest.raises(MemoryError, match=r"this would fit: allow .* of disk"):
        plan(shape, Limits(used["device"], used["host"], 0))


def test_a_home_that_is_asked_for_is_taken(shape):
    for home in ("device", "host", "disk"):
        assert {where for _, where in plan(shape, weights=home).homes} == {home}
    with pytest.raises(MemoryError, match="with weights on device"):
        plan(shape, Limits(1_000_000, HUGE, HUGE), weights="device")


def test_a_micro_batch_and_a_place_that_are_asked_for_are_taken(shape):
    found = plan(shape, micro_batch_size=2, block_inputs="host")
    assert (found.micro_batch_size, found.block_inputs) == (2, "host")


def test_a_smaller_micro_batch_is_chosen_only_where_it_is_needed(tiny_shape):
    shape = tiny_shape(changes={"intermediate_size": 512}, batch_size=16, seq_len=512, device="cuda")
    small = shape.footprint(micro_batch_size=2).totals()["device"]
    assert plan(shape, Limits(small, 0, 0)).micro_batch_size == 2
    assert plan(shape).micro_batch_size == 16


def test_on_a_cpu_there_are_memory_and_disk(tiny_shape):
    changes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    shape = tiny_shape(changes=changes, batch_size=1, seq_len=8)
    room = shape.footprint("device").totals()["device"]
    found = plan(shape, Limits(room - 2**20, 0, HUGE), FAST_TRANSFERS)
    assert found.count("host") == 0 and found.count("disk") > 0
    assert found.footprint.host == {}


def test_disk_writes_of_a_run(shape):
    found = plan(shape, weights="disk")
    assert found.time.disk_write_bytes == found.copy_bytes == shape.footprint("disk").disk[WEIGHTS]
    assert found.disk_bytes_written(1000) == 1001 * found.copy_bytes
    assert plan(shape).disk_bytes_written(1000) == 0


def test_the_same_every_time_and_plain_values(shape):
    limits = Limits(needed(shape, "device")["device"] - 1_000_000, HUGE, HUGE)
    first, second = plan(shape, limits), plan(shape, limits)
    assert first == second
    values = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    assert values["homes"][0] == ["model.embed_tokens", first.homes[0][1]]
    assert values["totals"]["device"] == sum(values["footprint"]["device"].values())
    assert values["speeds"]["sources"]["flops"] == "given"


def test_bad_arguments_are_refused(shape):
    for wrong in ({"weights": "cpu"}, {"micro_batch_size": 0}, {"micro_batch_size": 5}):
        with pytest.raises(ValueError):
            plan(shape, **wrong)


def test_sizes_of_micro_batches():
    assert micro_batches(1) == (1,)
    assert micro_batches(8) == (8, 4, 2, 1)
    assert micro_batches(12) == (12, 8, 4, 2, 1)


def test_llama_7b_on_a_small_gpu(llama_7b):
    speeds = Speeds(35e12, 24e9, 24e9, 3e9, 2e9, dict.fromkeys(NAMES, "given"))
    found = make_plan(llama_7b, limits=Limits(8 * 2**30, 32 * 2**30, 0), speeds=speeds)
    assert found.footprint.totals()["device"] <= 8 * 2**30
    assert found.time.bottleneck == "compute"  # 4096 tokens hide what goes over the bus
    assert found.count("host") > 0
    assert llama_7b.dtype == torch.bfloat16
