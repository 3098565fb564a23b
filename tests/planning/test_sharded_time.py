import pytest
import torch

from lowtide.planning import Sharding, find_link, rank_shape, sharded_time
from lowtide.planning.sharded_time import ASSUMED_CPU_LINK, Link
from lowtide.planning.speeds import NAMES, Speeds
from lowtide.planning.timing import step_flops

SPEEDS = Speeds(1e9, 3e9, 2e9, 1e9, 1e9, dict.fromkeys(NAMES, "given"))
FAST, SLOW = Link(1e15, 1e15, "given"), Link(1e3, 1e3, "given")


@pytest.fixture
def timed(tiny_shape):
    def run(num_ranks=4, link=FAST, ranks_per_node=None, offload=False, reduce_dtype="auto", speeds=SPEEDS, **options):
        sharding = Sharding(num_ranks, ranks_per_node, reduce_dtype, offload)
        shape = tiny_shape(**{"batch_size": 8, "device": "cuda", "changes": {"tie_word_embeddings": False}, **options})
        return sharded_time(rank_shape(shape, sharding), sharding, speeds, link)

    return run


def test_the_slower_of_link_and_computation_decides(timed):
    assert timed(link=FAST).bottleneck == "compute"
    found = timed(link=SLOW)
    assert found.bottleneck == "link"
    assert found.step_s == found.link_s + found.exposed_s > found.compute_s


def test_on_a_cpu_one_waits_for_the_other(timed):
    found = timed(device="cpu", link=Link(1e6, 1e6, "given"))
    assert found.step_s == found.link_s + found.compute_s
    assert found.exposed_s == 0


def test_computation_is_divided_and_traffic_is_not(timed, tiny_shape):
    two, eight = timed(2), timed(8)
    assert two.compute_s == 4 * eight.compute_s
    # (N - 1) / N of everything comes from others
    assert eight.gather_bytes / two.gather_bytes == pytest.approx((7 / 8) / (1 / 2), rel=0.1)
    assert two.flops == step_flops(tiny_shape(batch_size=4, changes={"tie_word_embeddings": False}))


def test_each_rank_updates_its_rows(timed):
    slow_memory = Speeds(1e15, 1e9, 1e9, 1e9, 1e9, dict.fromkeys(NAMES, "given"), memory=1e6)
    two, eight = (timed(ranks, speeds=slow_memory) for ranks in (2, 8))
    assert two.update_s == pytest.approx(4 * eight.update_s, rel=0.1)  # rows are padded
    assert two.compute_s == two.flops / 1e15 + two.update_s
    assert timed(offload=True, speeds=slow_memory).update_s == 0


def test_passes_of_exact_clipping(timed):
    plain, clipped = timed(), timed(exact_clipping=True)
    assert clipped.gather_bytes / plain.gather_bytes == pytest.approx(3 / 2)
    assert clipped.scatter_bytes == 2 * plain.scatter_bytes


def test_sums_in_float32_are_twice_as_much_to_send(timed):
    wide, narrow = (timed(dtype=torch.bfloat16, reduce_dtype=name) for name in ("auto", "weights"))
    assert wide.scatter_bytes == 2 * narrow.scatter_bytes
    assert narrow.gather_bytes == wide.gather_bytes == 2 * narrow.scatter_bytes


def test_within_nodes_less_is_gathered_from_afar(timed):
    everywhere, nodes = timed(8), timed(8, ranks_per_node=2)
    assert everywhere.reduce_bytes == 0
    assert nodes.gather_bytes < everywhere.gather_bytes
    # twice (4 - 1) / 4 of half of the gradients, between four nodes; nothing is padded much
    assert nodes.reduce_bytes == pytest.approx(2 * 3 / 4 * nodes.scatter_bytes, rel=0.01)
    slow_network = Link(1e15, 1e3, "given")
    assert timed(8, ranks_per_node=2, link=slow_network).bottleneck == "link"
    assert timed(8, link=slow_network).bottleneck == "compute"


def test_rows_in_host_memory_go_over_the_bus(timed):
    slow_bus = Speeds(1e15, 1e3, 1e3, 1e9, 1e9, dict.fromkeys(NAMES, "given"))
    assert timed(offload=True, speeds=slow_bus).bottleneck == "PCIe"
    assert timed(speeds=slow_bus).bus_s == 0


def test_the_link_is_given_or_the_bus_or_assumed(timed):
    assert find_link(SPEEDS, "cuda") == Link(2e9, 2e9, "that of PCIe, given")
    assert find_link(SPEEDS, "cpu") == Link(ASSUMED_CPU_LINK, ASSUMED_CPU_LINK, "assumed")
    assert find_link(SPEEDS, "cpu", {"rank_s": 5e9, "node_s": None}) == Link(5e9, 5e9, "given")
    assert find_link(SPEEDS, "cuda", {"rank_s": 5e9, "node_s": 1e9}) == Link(5e9, 1e9, "given")
