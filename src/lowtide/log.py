"""The project's logger: silent unless the application configures logging, and on rank 0 only unless asked otherwise."""

from __future__ import annotations

import logging
import os


class _RankZeroFilter(logging.Filter):
    """Drops records below ERROR on every rank but the first, so that N processes do not say everything N times."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or os.environ.get("RANK", "0") == "0"


def get_logger(name: str) -> logging.Logger:
    """The logger for a module of this package (pass ``__name__``)."""
    logger = logging.getLogger(name)
    if not any(isinstance(f, _RankZeroFilter) for f in logger.filters):
        logger.addFilter(_RankZeroFilter())
    return logger
