import pytest
import yaml

from lowtide.training import TrainConfig
from lowtide.training.choices import DEFAULT_LR, GROUPS, OPTIMIZERS

GIVEN = {"model": "m", "data": ["d.txt"], "output": "o"}


def test_defaults_are_valid():
    TrainConfig(**GIVEN).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model must not be empty"),
        ({"output": ""}, "output must not be empty"),
        ({"data": []}, "data must name"),
        ({"data": ["a.txt", ""]}, "data must not contain an empty path"),
        ({"eval_data": []}, "eval_data must name"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1"),
        ({"micro_batch_size": 9}, r"micro_batch_size must not be larger than batch_size \(8\), got 9"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"weights": "gpu"}, r"weights must be device, cpu, auto, or a directory .* as \./gpu"),
        ({"weights": ""}, "weights must be device, cpu, auto, or a directory"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"max_seq_len": 1}, "max_seq_len must be at least 2"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"samples": -1}, "samples must be at least 0"),
        ({"samples": 2, "eval_fraction": 0.0}, "samples are answers to held-out prompts"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"data_seed": -1}, "data_seed must be at least 0"),
        ({"lr": 0.0}, "lr must be a number above 0"),
        ({"lr": float("nan")}, "lr must be a number above 0"),
        ({"lr": float("inf")}, "lr must be a number above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"weight_decay": float("nan")}, "weight_decay must be 0 or more"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm must be a number above 0"),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm must be a number above 0"),
        ({"clip_grad_value": -1.0}, "clip_grad_value must be a number above 0"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be at least 0 and less than 1"),
        ({"eval_fraction": 1.0}, "eval_fraction must be at least 0 and less than 1"),
        ({"optimizer": "adaloom"}, r"optimizer must be one of .*got 'adaloom' \(did you mean adalomo\?\)"),
        ({"schedule": "linar"}, "did you mean linear"),
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"rounding": "up"}, "rounding must be one of stochastic, compensated, nearest, got 'up'"),
        ({"rounding": "stochastic", "dtype": "float32"}, "rounding stochastic is for 16-bit"),
        ({"rounding": "compensated", "dtype": "fp32"}, "rounding compensated is for 16-bit"),
        ({"clip": "adaptiv", "clip_grad_norm": 1.0}, "did you mean adaptive"),
        ({"clip_warmup_steps": 0}, "clip_warmup_steps must be at least 1"),
        ({"clip": "adaptive"}, "needs clip_grad_norm"),
        ({"clip": "adaptive", "optimizer": "lomo", "clip_grad_norm": 0.0}, "needs clip_grad_norm"),
        ({"clip_memory": "2GiB"}, "clip_memory is for clip exact"),
        ({"clip_memory": "2 potatoes", "clip_grad_norm": 1.0}, "clip_memory: '2 potatoes' is not a number of bytes"),
        ({"track": ["tensorbord"]}, r"track must be one of tensorboard, .*did you mean tensorboard\?"),
        ({"track": [""]}, "track must be one of"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:x"}, "device must be auto"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**(GIVEN | changes)).validate()


def test_one_path_may_be_given_without_a_list():
    config = TrainConfig(model="m", data="d.txt", eval_data="e.txt", output="o")
    config.validate()
    assert (config.data, config.eval_data) == (["d.txt"], ["e.txt"])


def test_every_optimizer_has_a_rate_and_a_given_rate_wins():
    assert [TrainConfig(**GIVEN, optimizer=name).effective_lr for name in OPTIMIZERS] == [
        DEFAULT_LR[name] for name in OPTIMIZERS
    ]
    assert TrainConfig(**GIVEN, lr=0.25).effective_lr == 0.25


def test_yaml_round_trip():
    config = TrainConfig(model="m", data=("a.txt", "b.txt"), output="o", lr=1e-5, packing=False)
    again = TrainConfig(**yaml.safe_load(yaml.safe_dump(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.lr == 1e-5


def test_every_field_has_help_in_a_known_group():
    for field in TrainConfig.__dataclass_fields__.values():
        assert field.metadata["group"] in GROUPS
        assert len(field.metadata["help"]) > 10


def test_plain_gradient_steps_are_clipped_unless_told_otherwise():
    def norm(**changes):
        config = TrainConfig(**(GIVEN | changes))
        config.validate()
        return config.effective_clip_grad_norm

    assert norm(optimizer="lomo") == norm(optimizer="sgd") == 1.0
    assert norm(optimizer="adalomo") is norm(optimizer="lomo", clip_grad_norm=0.0) is None
    assert norm(optimizer="adalomo", clip_grad_norm=0.5) == norm(optimizer="lomo", clip_grad_norm=0.5) == 0.5
