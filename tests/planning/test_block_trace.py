import pytest
import torch
from torch import nn

from lowtide.planning.block_trace import BlockCall, trace_block
from lowtide.planning.tracing import GRADIENTS, TEMPORARIES, WORKING

B, S, H = 4, 8, 16
INPUT = 4 * B * S * H
WEIGHT = 4 * H * H


class Layer(nn.Module):
    """One product and a sine, so that everything can be counted by hand."""

    def __init__(self, dtype):
        super().__init__()
        self.first = nn.Linear(H, H, bias=False, dtype=dtype)
        self.second = nn.Linear(H, H, bias=False, dtype=dtype)

    def forward(self, hidden):
        return self.second(self.first(hidden).sin())


def trace(size, dtype=torch.float32, update=lambda param: {}, **options):
    with torch.device("meta"):
        call = BlockCall(Layer(dtype), (torch.empty(B, S, H, dtype=dtype, requires_grad=True),), {})
    return trace_block(call, micro_batch_size=size, update=update, **options)


def test_forward_holds_two_activations_at_a_time():
    assert trace(B).forward == {WORKING: 2 * INPUT}


def test_forward_in_micro_batches_also_holds_the_output():
    assert trace(1).forward == {WORKING: INPUT + 2 * INPUT // 4}


def test_backward_of_the_whole_batch_holds_one_gradient():
    found = trace(B).backward
    # what the first product gave, the output, the gradient of the sine, the cosine, and these two multiplied
    assert found == {WORKING: 5 * INPUT}


def test_a_gradient_is_called_one_where_it_decides():
    # with a batch this small weights are larger than activations
    with torch.device("meta"):
        call = BlockCall(Layer(torch.float32), (torch.empty(1, 2, H, requires_grad=True),), {})
    found = trace_block(call, micro_batch_size=1, update=lambda param: {}).backward
    assert found[GRADIENTS] == WEIGHT


def test_micro_batches_hold_the_sums_of_the_whole_block():
    found = trace(1).backward
    assert found[GRADIENTS] == 3 * WEIGHT  # two sums and a gradient
    assert found[WORKING] < 5 * INPUT


def test_sums_of_16_bit_gradients_are_float32():
    found = trace(1, torch.bfloat16).backward
    assert found[GRADIENTS] == 2 * WEIGHT + WEIGHT // 2


def test_more_micro_batches_than_are_traced_change_nothing():
    with torch.device("meta"):
        calls = [BlockCall(Layer(torch.float32), (torch.empty(n, S, H, requires_grad=True),), {}) for n in (4, 8)]
    four, eight = (trace_block(call, micro_batch_size=1, update=lambda param: {}) for call in calls)
    assert eight.backward[GRADIENTS] == four.backward[GRADIENTS]


def test_updates_count_in_the_pass_that_updates_only():
    def update(param):
        return {TEMPORARIES: 10**6}

    assert trace(B, update=update).backward[TEMPORARIES] == 10**6
    assert TEMPORARIES not in trace(B, update=update, applies=False).backward


@pytest.mark.parametrize("size", [1, 3, B])
def test_the_heap_is_what_small_pieces_come_to(size):
    found = trace(size, heap_below=2**30)
    assert found.backward_heap == sum(found.backward.values())
    assert trace(size).backward_heap == 0


def test_the_block_is_left_as_it_was():
    with torch.device("meta"):
        block = Layer(torch.float32)
        call = BlockCall(block, (torch.empty(B, S, H, requires_grad=True),), {})
    trace_block(call, micro_batch_size=1, update=lambda param: {})
    assert all(param.grad is None and not param._post_accumulate_grad_hooks for param in block.parameters())
