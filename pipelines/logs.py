"""Logging as the workers of a job see it; the command line sets up its own."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

FORMAT = "%(asctime)s %(message)s"
DATE_FORMAT = "%H:%M:%S"


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what standard error is when a record comes, and not when the handler was made: a notebook or a test
    puts something else there meanwhile.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def configure_worker_logging() -> None:
    """Send our own log records, and only ours, to this worker's output, from where Ray takes them along."""
    # what other libraries tell of every report and every request is not what a reader looks for
    logging.getLogger().setLevel(logging.WARNING)
    logger = logging.getLogger("pipelines")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(FORMAT, DATE_FORMAT))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
