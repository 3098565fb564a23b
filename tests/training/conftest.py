"""A tiny saved model and settings that train it in a second."""

from tiny_run import make_config, model_dir  # noqa: F401
