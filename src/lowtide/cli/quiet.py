"""Keeps the libraries below from writing to the terminal, where only our own lines belong."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silence warnings and progress bars of transformers and its kin, unless LOWTIDE_DEBUG is set.

    Call it before they are first used. What is wrong reaches the user as an error of ours.
    """
    if os.environ.get("LOWTIDE_DEBUG", "0") not in ("", "0"):
        return
    warnings.filterwarnings("ignore")
    for name in ("transformers", "huggingface_hub", "datasets", "torch", "gguf"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
