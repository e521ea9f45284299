"""An evaluation in storage: done once, its commit record the report with the pictures by their names."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipelines.config import Config, digest
from pipelines.dataset import Dataset
from pipelines.records import (
    ObjectRecord,
    RecordError,
    commit_first,
    put_recorded,
    read_checked,
    read_record,
)
from pipelines.sample_recipe import Recipe
from pipelines.storage import ObjectMissing, Storage, open_storage

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
RECORD = "evaluation.json"


class EvaluationError(RecordError):
    """What an evaluation left is missing, damaged, or of a format that this version does not read."""


class EvaluationRecord(BaseModel):
    """`evaluation.json`, the commit record: what was judged, the report, and the pictures by their names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    kind: str = "ddpm-evaluation"
    identity: dict[str, Any]
    report: dict[str, Any]
    pictures: dict[str, ObjectRecord]


@dataclass(frozen=True)
class Finished:
    """An evaluation that is done, as storage has it."""

    report: dict[str, Any]
    pictures: dict[str, bytes]


def evaluation_identity(config: Config, dataset: Dataset, recipe: Recipe) -> dict[str, Any]:
    """What an evaluation is a function of: the samples and with them the checkpoint, the data, the settings."""
    return {
        "format_version": FORMAT_VERSION,
        "samples": recipe.identity(),
        "dataset": dataset.identity,
        # of the classifier and the noise
        "seed": config.seed,
        # every held-out image is used, whatever the setting for training says
        "bound": config.bound.model_dump(mode="json", exclude={"num_images"}),
    }


def evaluation_storage(config: Config, identity: Mapping[str, Any]) -> Storage:
    """The place of an evaluation: STORAGE/evaluations/NAME-ID/."""
    name = f"{config.name}-{digest(identity)[:10]}"
    return open_storage(config.storage).child("evaluations", name)


def find_evaluation(place: Storage) -> Finished | None:
    """The evaluation that was committed here, or None; a damaged one is none, with a warning."""
    try:
        record = read_record(place, RECORD, EvaluationRecord, FORMAT_VERSION, EvaluationError)
        pictures = {name: read_checked(place, one, EvaluationError) for name, one in record.pictures.items()}
    except ObjectMissing:
        return None
    except EvaluationError as error:
        log.warning("damaged, and made again: %s", error)
        return None
    return Finished(record.report, pictures)


def commit_evaluation(
    place: Storage, identity: dict[str, Any], report: dict[str, Any], pictures: dict[str, bytes]
) -> Finished:
    """Write the pictures and commit the report with them; returns the evaluation that stands."""
    attempt = uuid.uuid4().hex[:12]
    parts = ((f"{Path(name).stem}-{attempt}{Path(name).suffix}", data) for name, data in pictures.items())
    written = put_recorded(place, parts)
    record = EvaluationRecord(
        format_version=FORMAT_VERSION,
        identity=identity,
        report=report,
        pictures=dict(zip(pictures, written, strict=True)),
    )
    standing = commit_first(place, RECORD, record, written, lambda: find_evaluation(place))
    return standing or Finished(report, pictures)
