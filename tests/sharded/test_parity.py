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
}


def compare(ranks, alone, tolerance=TOLERANCE):
    for found in ranks:
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(alone["losses"]), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(found["norms"]), torch.tensor(alone["norms"]), rtol=1e-5, atol=0)
        for name, value in alone["weights"].items():
            assert (value - found["weights"][name]).abs().max() < tolerance, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", jobs.RULES)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_are_one_process(pools, size, rule, case):
    alone = jobs.train(rule, **CASES[case])
    compare(pools(size).run(jobs.train, rule, **CASES[case]), alone)


def test_a_loss_of_ones_own_is_the_mean_over_ranks(pools):
    """Where every rank counts as many tokens, that is the mean over all of them."""
    case = {"fuse": {"chunked_loss": False}, "padded": False}
    alone = jobs.train("lomo", **case)
    for found in pools(4).run(jobs.train, "lomo", **case):
        assert torch.tensor(found["norms"]).allclose(torch.tensor(alone["norms"]), rtol=1e-5)
        for name, value in alone["weights"].items():
            assert (value - found["weights"][name]).abs().max() < TOLERANCE, name


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma2", "gpt_neox"])
def test_families(pools, family):
    alone = jobs.train("adalomo", family, fuse={"micro_batch_size": 1})
    compare(pools(4).run(jobs.train, "adalomo", family, fuse={"micro_batch_size": 1}), alone)


@pytest.mark.parametrize("rule", jobs.RULES)
def test_rows_within_groups_and_copies_between_them(pools, rule):
    options = {"fuse": {"micro_batch_size": 1, "clip_grad_norm": 0.5}}
    alone = jobs.train(rule, **options)
    compare(pools(4).run(jobs.train, rule, **options, shard={"ranks_per_node": 2}), alone)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("rule", ["lomo", "adalomo", "adamw"])
def test_rounding_does_not_depend_on_the_number_of_ranks(pools, rule, rounding):
    """Gradients that are given, not computed, so that they are the same: then the weights are, bit for bit."""
    found = [
        jobs.update(rule, rounding),
        *pools(2).run(jobs.update, rule, rounding),
        *pools(4).run(jobs.update, rule, rounding),
    ]
    for each in found[1:]:
        if rule == "adalomo":  # its means are summed in another order
            assert all(
                (each[name] - value).abs().max() <= 2**-7 * value.abs().max() for name, value in found[0].items()
            )
        else:
            assert all(torch.equal(each[name], value) for name, value in found[0].items())


@pytest.mark.parametrize("reduce_dtype", ["auto", None])
def test_sums_of_micro_batches_are_in_the_reduce_dtype(pools, reduce_dtype):
    """FSDP2 adds gradients up in the dtype of the weights, unless it is told between two micro-batches."""
    for found in pools(2).run(jobs.dtypes_of_sums, reduce_dtype):
        assert found == ([torch.float32] * len(found) if reduce_dtype == "auto" else [None] * len(found)) and found
