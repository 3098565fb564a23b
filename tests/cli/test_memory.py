import pytest
import torch

from lowtide.cli.memory import advice_when_memory_lacks, lacks_memory
from lowtide.fused.engine import Engine
from lowtide.training import TrainConfig

ON_A_GPU = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.50 GiB. "
    "If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF"
)


def config(**settings):
    return TrainConfig(model="m", data=["d"], output="does-not-exist", **settings)


def message(error, **settings):
    with pytest.raises(MemoryError) as raised, advice_when_memory_lacks(config(**settings)):
        raise error
    return str(raised.value)


def test_malloc_of_torch_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 46)
    assert lacks_memory(raised.value)
    assert lacks_memory(torch.OutOfMemoryError("CUDA out of memory")) and lacks_memory(MemoryError())
    assert not lacks_memory(RuntimeError("shapes cannot be multiplied"))
    assert not lacks_memory(ValueError("can't allocate memory"))


def test_what_would_need_less_and_leaves_the_result_comes_first():
    text = message(torch.OutOfMemoryError(ON_A_GPU))
    assert text.startswith("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.50 GiB. ")
    assert "The same result with less: --micro-batch-size 1, --weights auto. Or, with another result: " in text
    assert "PYTORCH_CUDA_ALLOC_CONF" not in text and "Nothing was saved" not in text


def test_only_what_is_not_at_its_smallest_yet_is_named():
    text = message(torch.OutOfMemoryError(ON_A_GPU), weights="cpu", micro_batch_size=1)
    assert "The same result" not in text and "Less: a smaller --max-seq-len. lowtide plan" in text
    text = message(torch.OutOfMemoryError(ON_A_GPU), optimizer="adamw", dtype="float32", weights="auto")
    assert "--keep-activations 0" in text and "--optimizer adalomo, --dtype bfloat16" in text
    assert "--weights" not in message(torch.OutOfMemoryError(ON_A_GPU), lora_rank=8)


def test_processes_are_told_of_host_memory(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    text = message(torch.OutOfMemoryError(ON_A_GPU))
    assert "--weights cpu" in text and "--micro-batch-size" not in text  # each has one row


def test_packed_rows_of_flash_attention_go_one_by_one_already():
    assert "--micro-batch-size" not in message(torch.OutOfMemoryError(ON_A_GPU), attention="flash_attention_2")


def test_other_errors_stay_as_they_are():
    for error in (RuntimeError("shapes cannot be multiplied"), MemoryError("no plan fits"), ValueError("lr")):
        with pytest.raises(type(error)) as raised, advice_when_memory_lacks(config()):
            raise error
        assert raised.value is error


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_run_that_ends_so_says_how_to_go_on(lowtide, model_dir, task, tmp_path, monkeypatch, checkpoint):
    """In its second step; with a checkpoint the advice is followed, and the run ends well."""
    real, calls = Engine.backward, []

    def backward(engine, *args, **kwargs):
        calls.append(engine)
        if len(calls) == 2:
            torch.empty(1 << 46)
        return real(engine, *args, **kwargs)

    monkeypatch.setattr(Engine, "backward", backward)
    arguments = ["train", "--model", model_dir, "--data", task, "--output", tmp_path / "out", "--max-steps", "3", "--max-seq-len", "32"]  # fmt: skip
    arguments += ["--device", "cpu", "--dtype", "float32", "--batch-size", "4", *(["--save-every", "1"] if checkpoint else [])]  # fmt: skip
    result = lowtide(*arguments)
    assert result.code == 1
    assert "can't allocate memory" in result.err[-1] and "--micro-batch-size 1" in result.err[-1]
    assert ("Nothing was saved" in result.err[-1]) != checkpoint
    assert ("--resume --allow-changes" in result.err[-1]) == checkpoint
    assert ("--dtype bfloat16" in result.err[-1]) != checkpoint  # a run cannot go on in another
    assert not (tmp_path / "out" / "model").exists()
    if checkpoint:
        assert lowtide(*arguments, "--resume", "--allow-changes", "--micro-batch-size", "1").code == 0
