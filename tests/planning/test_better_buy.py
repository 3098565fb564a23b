import dataclasses
import json
import re

import pytest

from lowtide.planning import Footprint, Limits, Option, Sharding, better_buy, compare_ranks, one_rank, sharded_footprint
from lowtide.planning.better_buy import rank_counts
from lowtide.planning.sharded_time import Link
from lowtide.planning.speeds import NAMES, Speeds

HUGE = 10**15
COMPUTES = Speeds(1e6, 1e15, 1e15, 1e15, 1e15, dict.fromkeys(NAMES, "given"))
SLOW_DISK = Speeds(1e15, 1e9, 1e9, 1e3, 1e3, dict.fromkeys(NAMES, "given"))
FAST, SLOW = Link(1e15, 1e15, "given"), Link(1.0, 1.0, "given")


def option(num_ranks, tokens_per_s, fits=True, home="device"):
    footprint = Footprint({"weights": 1}, {}, {}) if fits or num_ranks > 1 else None
    speed = tokens_per_s if footprint else 0.0
    return Option(num_ranks, home, 1, footprint, fits, 1.0, speed, "compute")


@pytest.fixture
def shape(tiny_shape):
    changes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "tie_word_embeddings": False}
    return tiny_shape(changes=changes, device="cuda", batch_size=8, seq_len=8)


def compared(shape, num_ranks=8, limits=None, speeds=COMPUTES, link=FAST, **options):
    limits = limits or Limits(HUGE, HUGE, HUGE)
    single, _ = one_rank(shape, limits=limits, speeds=speeds)
    return compare_ranks(shape, Sharding(num_ranks), single=single, limits=limits, speeds=speeds, link=link, **options)


@pytest.mark.parametrize(
    ("speeds", "better", "words"),
    [
        # each rank does more, and 4 do more each than 2
        ((100, 310, 800), 4, "4 GPUs that share the model are 8 times as fast as one with weights on disk, so each GPU does 2 times"),
        # each rank does more, 2 as much as 4
        ((100, 310, 620), 2, "2 GPUs that share the model are 3.1 times as fast"),
        ((100, 199, 398), 4, "so each GPU does as much: 4 are as good a buy as one"),
        ((100, 199, 300), 2, "2 are as good a buy as one"),
        ((100, 150, 200), 1, "4 GPUs that share the model are 2 times as fast as one with weights on disk, so each GPU does only 0.5 times"),
        ((100, 20, 50), 1, "One GPU with weights on disk is 2 times as fast as 4 over this link: one GPU is the better buy"),
    ],
)  # fmt: skip
def test_the_sentence_follows_from_the_numbers(speeds, better, words):
    options = [option(1, speeds[0], home="disk"), option(2, speeds[1]), option(4, speeds[2])]
    found, sentence = better_buy(options)
    assert found.num_ranks == better
    assert words in sentence


def test_what_does_not_fit_is_no_buy():
    found, sentence = better_buy([option(1, 100), option(2, 1000, fits=False)])
    assert found.num_ranks == 1 and "One GPU that holds it whole is the only way that fits: 2" in sentence
    found, sentence = better_buy([option(1, 0, fits=False), option(2, 100, fits=False), option(4, 300), option(8, 900)])
    assert found.num_ranks == 8 and "4 that share the model can, and with 8 each of them does most" in sentence
    found, sentence = better_buy([option(1, 0, fits=False), option(2, 300), option(4, 400)], "machine")
    assert found.num_ranks == 2 and sentence.endswith("2 that share the model can.")
    found, sentence = better_buy([option(1, 0, fits=False), option(2, 300, fits=False)])
    assert found is None and "Nothing fits" in sentence


def test_over_a_fast_link_ranks_do_as_much_each_and_over_a_slow_one_do_not_pay(shape):
    fast, slow = compared(shape), compared(shape, link=SLOW)
    assert [found.num_ranks for found in fast] == [1, 2, 4, 8]
    assert [found.bottleneck for found in fast] == ["compute"] * 4
    assert [found.bottleneck for found in slow] == ["compute"] + ["link"] * 3
    times = [found.step_s for found in fast]
    assert times == sorted(times, reverse=True)
    assert better_buy(fast)[0].num_ranks == 8
    assert better_buy(slow)[0].num_ranks == 1
    assert "over this link" in better_buy(slow)[1]


def test_ranks_that_hold_what_one_has_on_disk_are_the_better_buy(shape, monkeypatch):
    from lowtide.planning import step_shape

    monkeypatch.setattr(step_shape, "STAGING_BYTES", 4 * 4096)
    room = sharded_footprint(shape, 8, micro_batch_size=1).totals()["device"]
    limits = Limits(room, 4 * 4096, HUGE)
    options = compared(shape, limits=limits, speeds=SLOW_DISK)
    assert "disk" in options[0].home and options[0].bottleneck == "disk"
    found, sentence = better_buy(options)
    assert found.num_ranks > 1 and found.fits
    each = found.tokens_per_rank_s / options[0].tokens_per_rank_s
    assert each > 1
    assert float(re.search(r"does (\S+) times", sentence)[1]) == pytest.approx(each, rel=0.1)


def test_the_largest_micro_batch_that_fits_is_taken(tiny_shape):
    shape = tiny_shape(changes={"intermediate_size": 512}, batch_size=32, seq_len=256, device="cuda")
    room = sharded_footprint(shape, 2, micro_batch_size=2).totals()["device"]
    single, _ = one_rank(shape, limits=Limits(HUGE, 0, 0), speeds=COMPUTES)
    options = {"single": single, "speeds": COMPUTES, "link": FAST}
    (_, found) = compare_ranks(shape, Sharding(2), limits=Limits(room, 0, 0), **options)
    assert (found.micro_batch_size, found.fits) == (2, True)
    (_, found) = compare_ranks(shape, Sharding(2), limits=Limits(room, 0, 0), micro_batch_size=16, **options)
    assert (found.micro_batch_size, found.fits) == (16, False)


def test_rows_go_to_host_memory_where_a_device_is_too_small_for_them(shape):
    there = sharded_footprint(shape, 4, micro_batch_size=1, offload=True).totals()
    here = sharded_footprint(shape, 4, micro_batch_size=1).totals()["device"]
    limits = Limits((there["device"] + here) // 2, 4 * there["host"], 0)
    for weights, home, fits in (("auto", "host", True), ("device", "device", False)):
        found = compared(shape, 4, limits, weights=weights)[-1]
        assert (found.home, found.fits) == (home, fits)
    # the rows of all ranks of a node are in its memory
    less = dataclasses.replace(limits, host=4 * there["host"] - 4)
    assert not compared(shape, 4, less)[-1].fits


def test_numbers_of_ranks():
    assert rank_counts(Sharding(8)) == (2, 4, 8)
    assert rank_counts(Sharding(6)) == (2, 4, 6)
    assert rank_counts(Sharding(12, 3)) == (2, 12)
    assert rank_counts(Sharding(16, 4)) == (2, 4, 8, 16)


def test_plain_values(shape):
    options = compared(shape, 2)
    values = json.loads(json.dumps([found.to_dict() for found in options], allow_nan=False))
    assert values[1]["time"]["bottleneck"] == options[1].bottleneck
    assert values[1]["totals"]["device"] == sum(options[1].footprint.device.values())
    nothing = option(1, 0, fits=False).to_dict()
    assert nothing["tokens_per_s"] is None and nothing["footprint"] is None
