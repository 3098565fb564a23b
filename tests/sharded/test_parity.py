"""Any number of ranks gives what one process gives on the same batch."""

import jobs
import pytest
import torch

TOLERANCE = 1e-6
CASES = {
    "plain": {},
    "micro-batches": {"fuse": {"micro_batch_size": 1}},
    "two passes": {"fuse": {"clip_grad_norm": 0.5}},
    "two passes, micro-batches, kept": {
        "fuse": {"clip_grad_norm": 0.5, "micro_batch_size": 1, "clip_memory_bytes": 20_000}
    },
    "adaptive": {"fuse": {"clip_grad_norm": 0.5, "clip": "adaptive", "clip_warmup_steps": 2}},
    "values": {"fuse": {"clip_grad_value": 1e-3}},
    "untied": {"model_changes": {"tie_word_embeddings": False}},
    "frozen": {"frozen": True, "fuse": {"micro_batch_size": 1}},
    "uneven": {"model_changes": {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 6}},
    "own loss": {"fuse": {"chunked_loss": False}, "same_counts": True},
}


def compare(ranks, alone, tolerance=TOLERANCE):
    for found in ranks:
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(alone["losses"]), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(found["norms"]), torch.tensor(alone["norms"]), rtol=1e-5, atol=0)
        for name, value in alone["weights"].items():
            assert (value - found["weights"][name]).abs().max() < tolerance, name


@pytest.mark.parametrize("case", [name for name in CASES if name != "own loss"])
@pytest.mark.parametrize("rule", jobs.RULES)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_are_one_process(pools, size, rule, case):
    alone = jobs.train(rule, **CASES[case])
    # AdaLomo and AdamW divide by the root of the gradient's square, which multiplies differences of small gradients.
    compare(pools(size).run(jobs.train, rule, **CASES[case]), alone, TOLERANCE * (1 if rule == "lomo" else 20))
