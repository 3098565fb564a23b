import torch
from torch import nn

from lowtide.planning.tracing import ALLOCATOR, GRADIENTS, LOGITS, OTHER, MemoryTrace, added


def meta(*shape, **options):
    return torch.empty(shape, device="meta", **options)


def test_bytes_are_counted_while_a_storage_lives():
    trace = MemoryTrace()
    with trace:
        first = meta(100)
        view = first[10:]
        second = meta(50)
        del first, second
        assert sum(trace.live.values()) == 400  # the view keeps it
        del view
    assert sum(trace.live.values()) == 0
    assert trace.peak == {OTHER: 600}


def test_works_the_same_on_real_tensors():
    trace = MemoryTrace()
    with trace:
        product = torch.ones(8, 4) @ torch.ones(4, 8)
    assert product.sum() == 256
    assert trace.peak == {OTHER: 4 * (32 + 32 + 64)}


def test_what_is_ignored_does_not_count_but_its_copies_do():
    weight = meta(10)
    trace = MemoryTrace()
    trace.ignore([weight])
    with trace:
        weight.mul_(2)
        copy = weight.clone()
    assert trace.live == {OTHER: copy.nbytes}


def test_a_storage_changes_its_kind_at_the_peak_too():
    trace = MemoryTrace()
    with trace, trace.kind(LOGITS):
        kept, gone = meta(100), meta(100)
        del gone
        trace.retag(kept, GRADIENTS)
    assert trace.live[GRADIENTS] == 400
    assert trace.peak == {LOGITS: 400, GRADIENTS: 400}


def test_something_for_a_moment_is_a_peak_but_does_not_stay():
    trace = MemoryTrace()
    with trace:
        tensor = meta(10)
        trace.transient({LOGITS: 1000})
    assert trace.peak == {OTHER: tensor.nbytes, LOGITS: 1000}
    assert sum(trace.live.values()) == 40


def test_small_pieces_stay_resident_until_a_new_peak_is_begun():
    trace = MemoryTrace(heap_below=1000)
    with trace:
        small = meta(200)  # 800 bytes, from the heap
        del small
        assert trace.retained == 800
        large = meta(1000)  # comes from the system
        assert trace.peak == {OTHER: 4000, ALLOCATOR: 800}
        again = meta(200)  # finds its room
        assert trace.heap_high == 800
        trace.take_peak()
        del again
        assert trace.retained == 800
        trace.take_peak()
        assert trace.retained == 0
    del large


def test_two_gradients_of_one_tensor_are_added_in_place():
    param = nn.Parameter(meta(100))
    trace = MemoryTrace()
    trace.ignore([param])
    peaks = []
    param.register_post_accumulate_grad_hook(lambda p: peaks.append(sum(trace.live.values())))
    with trace:
        loss = (param.sin() + param.cos()).sum()
        loss.backward()
    assert peaks[0] <= 3 * 400  # the sum, and what is on its way; one more if it were made anew


def test_the_answer_decides_about_masks():
    for answer in (True, False):
        with MemoryTrace(answer=answer):
            assert bool(meta(3, dtype=torch.bool).all()) is answer


def test_products_in_float32_slices():
    a, b = meta(4, 8, dtype=torch.bfloat16), meta(8, 100, dtype=torch.bfloat16)
    trace = MemoryTrace(float32_products=True)
    trace.ignore([a, b])
    with trace:
        a @ b
    assert sum(trace.peak.values()) == 4 * 100 * 2 + 4 * (4 * 8 + 8 * 100 + 4 * 100)


def test_sums_leave_nothing_behind_that_is_zero():
    assert added({"a": 1, "b": 2}, {"a": -1}, {"c": 3}) == {"b": 2, "c": 3}
