"""What lies at an address, told by its commit record, and whether it is whole."""

from __future__ import annotations

from pipelines.checkpoints import COMMIT
from pipelines.dataset import RECORD_KEY, load_from
from pipelines.errors import UserError
from pipelines.sample_set import RECORD as SAMPLES_RECORD
from pipelines.storage import Storage, open_storage
from pipelines.train import RUN_RECORD
from pipelines.verified import Progress, Verified
from pipelines.verify_dataset import verify_dataset
from pipelines.verify_run import verify_checkpoint, verify_run
from pipelines.verify_samples import verify_samples

RECORDS = {
    RECORD_KEY: "data set",
    RUN_RECORD: "run",
    SAMPLES_RECORD: "sample set",
    COMMIT: "checkpoint",
}
_WITHOUT_RECORD = {
    "preparation.json": "data set",
    "checkpoints/step-": "run",
    "units/unit-": "sample set",
    "weights-": "checkpoint",
}
"""What is there while the record is not yet, or not any more."""


def verify(address: str, *, deep: bool = False, progress: Progress | None = None) -> Verified:
    """Check the data set, run, checkpoint or sample set at an address.

    What is wrong with it is returned. Raises `UserError` where there is none of them, `DataError` where a data
    set's record or list of shards can't be read, `StorageError` where the storage can't.
    """
    storage = open_storage(address)
    kind = kind_at(storage)
    if kind == "data set":
        return verify_dataset(load_from(storage), deep=deep, progress=progress)
    checks = {"run": verify_run, "sample set": verify_samples, "checkpoint": verify_checkpoint}
    return checks[kind](storage, deep=deep, progress=progress)


def kind_at(storage: Storage) -> str:
    """Which of them lies at a prefix; raises `UserError` if none does."""
    for record, kind in RECORDS.items():
        if storage.exists(record):
            return kind
    # what is on the web can't be listed
    if not storage.uri.startswith(("http:", "https:")):
        for prefix, kind in _WITHOUT_RECORD.items():
            if storage.list(prefix):
                return kind
    raise UserError(
        f"{storage.uri}: there is no data set, run, sample set or checkpoint here (no {', '.join(RECORDS)}); give "
        "the prefix of one"
    )
