"""How often ranks talk to each other, and that they decide alike."""

import math

import jobs
import pytest
import torch

import lowtide
from helpers import tiny_batch, tiny_model
from lowtide.evaluation import evaluate_loss
from lowtide.weights import sharding

NUM_BLOCKS = 3
UNITS = (
    NUM_BLOCKS + 2
)  # of the tiny model: blocks, the vocabulary's matrix (embedding and head are tied), and the last norm


@pytest.mark.parametrize("micro_batch_size", [None, 1])
@pytest.mark.parametrize("rule", ["lomo", "adalomo", "adamw"])
def test_one_gather_a_unit_and_pass_and_one_scatter_a_unit(pools, rule, micro_batch_size):
    for found in pools(2).run(jobs.count_collectives, rule=rule, micro_batch_size=micro_batch_size):
        assert found["allgather_"] == 2 * UNITS
        assert found["reduce_scatter_"] == UNITS
        # A few numbers each: the loss, whether it is finite, the norms of a unit; AdaLomo's sums, twice a unit.
        assert found["allreduce_"] == 2 + UNITS + (
            2 * UNITS - 1 if rule == "adalomo" else 0
        )  # a norm's moments are not factored
        assert set(found) <= {"allgather_", "reduce_scatter_", "allreduce_"}


def test_exact_clipping_gathers_and_scatters_once_more(pools):
    found = pools(2).run(jobs.count_collectives, clip_grad_norm=1.0)[0]
    assert found["allgather_"] == 3 * UNITS
    assert found["reduce_scatter_"] == 2 * UNITS


def test_kept_gradients_save_the_second_pass(pools):
    found = pools(2).run(jobs.count_collectives, clip_grad_norm=1.0, clip_memory_bytes=2**30)[0]
    assert found["reduce_scatter_"] == UNITS


def test_the_public_code_reduces_every_gradient_as_a_whole(monkeypatch):
    """What the counts above are to be compared with: lomo-optim under ZeRO-3, whose calls are counted instead of made."""
    lomo = pytest.importorskip("lomo_optim.lomo", reason="lomo-optim is the oracle: pip install --no-deps lomo-optim")
    model, sizes = tiny_model(), []
    monkeypatch.setattr(lomo, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: sizes.append(tensor.numel()))
    monkeypatch.setattr(lomo.dist, "get_rank", lambda: 0, raising=False)
    for param in model.parameters():
        param.ds_tensor = param.data.view(-1)
    optimizer = lomo.Lomo(model, lr=0.1)
    for _ in range(2):  # micro-batches
        optimizer.fused_backward(model(**tiny_batch(0)).loss, 0.1)
    num_tensors = len(list(model.parameters()))
    assert len(sizes) == 2 * num_tensors > 2 * UNITS
    assert sum(sizes) == 2 * sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 1.0}, {"micro_batch_size": 1}], ids=str)
@pytest.mark.parametrize("where", ["loss", 0, 2])
def test_what_breaks_on_one_rank_is_left_out_by_all(pools, where, options):
    found = pools(4).run(jobs.broken_gradient, where, **options)
    first = found[0]
    assert first["skipped"] or first["partial"]
    assert not math.isfinite(first["norm"])
    if where == "loss" or "clip_grad_norm" in options:
        assert first["skipped"] and first["changed"] == []
    if where == 2 and options == {}:  # in front of the last block: it was updated before
        assert first["partial"] and all("layers.2" in name or "norm" in name for name in first["changed"])
    assert all(math.isfinite(number) for number in first["next"][:2]) and first["next"][2] is False
    for other in found[1:]:
        assert all(other[name] == first[name] for name in ("skipped", "partial", "changed", "next"))
        assert all(torch.equal(other["weights"][name], value) for name, value in first["weights"].items())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("not sharded", "lowtide.shard(model)"),
        ("optimizer too early", "are in no optimizer"),
        ("twice", "sharded already"),
        ("groups", "cannot be divided into groups of 3"),
        ("home", "live on its ranks"),
        ("columns", "only Shard(dim=0)"),
        ("some processes", "the mesh has 1 of 2 processes"),
        ("dtypes", "model.layers.1.input_layernorm.weight in torch.float64"),
    ],
)
def test_refusals(pools, what, message):
    for found in pools(2).run(jobs.refused, what):
        assert message in found


def test_a_sharded_model_can_be_evaluated(pools):
    model = tiny_model()
    expected = evaluate_loss(model, [tiny_batch(1)]).loss
    for found in pools(4).run(jobs.evaluate_sharded):
        assert found == (pytest.approx(expected, rel=1e-6), pytest.approx(expected, rel=1e-6))


def test_offload_is_refused_where_torch_races(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.1+cu130")
    with pytest.raises(RuntimeError, match=r"needs torch 2\.13"):
        sharding.check_offload()
    with pytest.raises(RuntimeError, match=r"needs torch 2\.13"):
        lowtide.shard(torch.nn.Linear(2, 2), offload=True)


def test_without_a_process_group_there_is_an_explanation():
    with pytest.raises(RuntimeError, match="torchrun"):
        lowtide.shard(torch.nn.Linear(2, 2))


def test_a_loss_scale_falls_on_all_ranks(pools):
    found = pools(2).run(jobs.overflow)
    for each in found:
        assert each["skipped"] == [True, False, False]
        assert each["scales"][0] == 2.0**9
        assert each["scales"] == found[0]["scales"]
        assert all(torch.equal(each["weights"][name], value) for name, value in found[0]["weights"].items())
