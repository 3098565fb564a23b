import pytest
import torch

from lowtide.optim import AdaLomo, Lomo, PerParameter
from lowtide.training.setup import (
    check_disk,
    check_output,
    count_steps,
    make_optimizer,
    resolve_device,
    without_cache,
)


def test_output_may_be_new_or_empty(tmp_path):
    assert check_output(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    assert check_output(tmp_path) == tmp_path


def test_output_must_not_hold_anything(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        check_output(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(PermissionError, match="file is not a directory"):
        check_output(tmp_path / "file" / "out")


def test_a_full_disk_is_noticed_before_training(tmp_path, monkeypatch):
    model = torch.nn.Linear(10, 10, bias=False)
    usage = type("Usage", (), {"free": 400})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    check_disk(tmp_path / "new", model)
    usage.free = 399
    with pytest.raises(OSError, match=r"400 B, but the disk .* has 399 B"):
        check_disk(tmp_path / "new", model)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="device cuda is not there"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="cuda:2"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(None, None, 10), (3, None, 30), (None, 7, 7), (None, 70, 70), (2, 70, 20), (2, 5, 5)],
)
def test_count_steps(make_config, epochs, max_steps, expected):
    assert count_steps(make_config(epochs=epochs, max_steps=max_steps), steps_per_epoch=10) == expected


def test_weight_decay_is_for_matrices_only(make_config):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    model[0].weight.requires_grad_(True)
    model[1].weight.requires_grad_(False)
    matrices, vectors = make_optimizer(make_config(weight_decay=0.5), model).param_groups
    assert matrices["params"] == [model[0].weight]
    assert {id(p) for p in vectors["params"]} == {id(model[0].bias), id(model[1].bias)}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("name", "kind", "inner"),
    [
        ("lomo", Lomo, None),
        ("adalomo", AdaLomo, None),
        ("adamw", PerParameter, torch.optim.AdamW),
        ("sgd", PerParameter, torch.optim.SGD),
    ],
)
def test_optimizers(make_config, name, kind, inner):
    optimizer = make_optimizer(make_config(optimizer=name, lr=0.3), torch.nn.Linear(2, 2))
    assert type(optimizer) is kind
    assert getattr(optimizer, "optimizer_class", None) is inner
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}


def test_the_cache_is_off_inside_only():
    model = torch.nn.Linear(1, 1)
    model.config = type("Config", (), {"use_cache": True})()
    with pytest.raises(KeyError), without_cache(model):
        assert model.config.use_cache is False
        raise KeyError
    assert model.config.use_cache is True
