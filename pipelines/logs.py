"""Logging as the workers of a job see it; the command line sets up its own."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s %(message)s"
DATE_FORMAT = "%H:%M:%S"


def configure_worker_logging() -> None:
    """Send our own log records, and only ours, to this worker's output, from where Ray takes them along."""
    # Ray and boto3 tell every worker's every report and where they found credentials
    for chatty in ("ray.train", "botocore", "mlflow"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logger = logging.getLogger("pipelines")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(FORMAT, DATE_FORMAT))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
