"""What the command line lets through to the terminal: our own lines, not those of the libraries below."""

from __future__ import annotations

import logging
import os
import sys
import warnings

_DATA = "lowtide.data.records"


class _StandardOutput(logging.Handler):
    """Writes what is no warning to whatever standard output is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            print(record.getMessage(), flush=True)


class _StandardError(logging.Handler):
    """Writes ``lowtide: message`` to whatever standard error is at that moment: a live progress bar replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        print("lowtide:", " ".join(record.getMessage().split()), file=sys.stderr)


def quiet_libraries(*, tell_data: bool = False) -> None:
    """Silence warnings and progress bars of transformers and its kin, unless LOWTIDE_DEBUG is set.

    Call it before they are first used. What is wrong reaches the user as an error of ours. Warnings of lowtide itself
    go to standard error, a line each.

    Args:
        tell_data: of every file of data that is read, print a line on what was found in it.
    """
    data = logging.getLogger(_DATA)
    data.setLevel(logging.INFO if tell_data else logging.NOTSET)
    if not any(isinstance(handler, _StandardOutput) for handler in data.handlers):
        data.addHandler(_StandardOutput(logging.INFO))
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
