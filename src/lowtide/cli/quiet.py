"""What the command line lets through to the terminal: our own lines, not those of the libraries below."""

from __future__ import annotations

import logging
import os
import sys
import warnings


class _StandardError(logging.Handler):
    """Writes ``lowtide: message`` to whatever standard error is at that moment: a live progress bar replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        print("lowtide:", " ".join(record.getMessage().split()), file=sys.stderr)


def quiet_libraries() -> None:
    """Silence warnings and progress bars of transformers and its kin, unless LOWTIDE_DEBUG is set.

    Call it before they are first used. What is wrong reaches the user as an error of ours. Warnings of lowtide itself
    go to standard error, a line each.
    """
    ours = logging.getLogger("lowtide")
    if not any(isinstance(handler, _StandardError) for handler in ours.handlers):
        ours.addHandler(_StandardError(logging.WARNING))
        ours.propagate = False
    if os.environ.get("LOWTIDE_DEBUG", "0") not in ("", "0"):
        return
    warnings.filterwarnings("ignore")
    for name in ("transformers", "huggingface_hub", "datasets", "torch", "gguf"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
