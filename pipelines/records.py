"""Commit records: small JSON objects that come last and name data objects with size and SHA-256.

Writing is in this order: the data objects, under names that carry the attempt; then the record, by one
conditional PUT, so that of two writers the first one's stands.  A record whose objects are damaged or gone
stands for nothing and is replaced.  Readers start from records.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipelines.errors import UserError
from pipelines.storage import ObjectMissing, Storage, checked_key

log = logging.getLogger(__name__)

Record = TypeVar("Record", bound=BaseModel)
Standing = TypeVar("Standing")


class RecordError(UserError):
    """A record or an object that it names is missing, damaged, or of a format that this version does not read."""


def _key_below(key: str) -> str:
    """A key that a record names, which must not lead out of the record's own prefix."""
    try:
        return checked_key(key)
    except UserError as error:
        # as pydantic takes it
        raise ValueError(str(error)) from None


class ObjectRecord(BaseModel):
    """One object of a commit: where, how large, and its SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: Annotated[str, AfterValidator(_key_below)]
    num_bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


_MAX_DEPTH = 50
"""Levels of a JSON value; what we write has a handful, and by the hundred they exhaust the stack later on."""


def parse_json(
    data: bytes, where: str, error: type[RecordError] = RecordError, *, finite: bool = True
) -> Any:
    """The JSON value in an object; raises `error` naming it if it is none, or nested by the dozen.

    finite: numbers must be, which JSON asks for and Python's reader and writer do not.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # RecursionError: brackets by the thousand
        raise error(f"{where}: is not JSON; the object is damaged") from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        if finite and any(isinstance(one, float) and not math.isfinite(one) for one in level):
            raise error(f"{where}: holds a number that is not finite; the object is damaged")
        within = (
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)
        )
        level = [one for values in within for one in values]
        if not level:
            return value
    raise error(f"{where}: is nested more than {_MAX_DEPTH} levels deep; the object is damaged")


def read_record(
    storage: Storage, key: str, model: type[Record], version: int, error: type[RecordError] = RecordError
) -> Record:
    """A JSON record of one of our formats; an unknown version is refused with both versions named.

    Raises `ObjectMissing` where there is none, and `error` where it can't be read.
    """
    where = f"{storage.uri}/{key}"
    data = storage.get(key)
    values = parse_json(data, where, error)
    found = values.get("format_version") if isinstance(values, dict) else None
    if type(found) is not int or found != version:
        raise error(f"{where}: has format version {found}, this program reads {version}")
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        problem = invalid.errors()[0]
        reason = problem["msg"].removeprefix("Value error, ")
        raise error(f"{where}: {'.'.join(map(str, problem['loc']))}: {reason}") from None


def read_checked(storage: Storage, record: ObjectRecord, error: type[RecordError] = RecordError) -> bytes:
    """The object of a record, checked by size and SHA-256; raises `error` naming it."""
    where = f"{storage.uri}/{record.key}"
    try:
        data = storage.get(record.key)
    except ObjectMissing:
        raise error(f"{where}: is named by its commit record and missing") from None
    if len(data) != record.num_bytes:
        raise error(f"{where}: has {len(data)} bytes, its commit record says {record.num_bytes}")
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise error(f"{where}: its SHA-256 differs from its commit record's")
    return data


def put_recorded(
    storage: Storage, parts: Iterable[tuple[str, bytes]], hashes: Mapping[str, str] | None = None
) -> list[ObjectRecord]:
    """Write these objects (key, bytes) and return their records; where one fails, none is left behind.

    `hashes`: SHA-256 of objects, by key, of which it is known already.
    """
    written: list[ObjectRecord] = []
    try:
        for key, data in parts:
            storage.put(key, data)
            digest = (hashes or {}).get(key) or hashlib.sha256(data).hexdigest()
            written.append(ObjectRecord(key=key, num_bytes=len(data), sha256=digest))
    except BaseException:
        discard(storage, written)
        raise
    return written


def commit_first(
    storage: Storage,
    key: str,
    record: BaseModel,
    objects: Iterable[ObjectRecord],
    standing: Callable[[], Standing | None],
) -> Standing | None:
    """Commit `record`, which names `objects`, unless a whole one stands there already.

    Returns None where ours stands, else what `standing` says of the other: it reads that one with all that it
    names, and says None if anything of it is damaged.  Then ours takes its place, since that damage is why the
    work was done a second time.
    """
    data = record.model_dump_json(indent=2).encode()
    # from here on an error does not say that there is no commit, so the objects stay
    if storage.put_if_absent(key, data):
        return None
    found = standing()
    if found is None:
        storage.put(key, data)
        return None
    discard(storage, objects)
    return found


def discard(storage: Storage, objects: Iterable[ObjectRecord]) -> None:
    """Delete objects that no commit names; what can't be deleted is warned about and stays."""
    try:
        storage.delete(record.key for record in objects)
    except UserError as error:
        log.warning("left uncommitted objects behind: %s", error)
