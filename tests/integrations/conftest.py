"""The tiny model and settings of the tests of training."""

from tiny_run import make_config, model_dir  # noqa: F401
