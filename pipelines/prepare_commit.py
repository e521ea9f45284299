"""The prefix of a data set that is being made: who has taken it, what of it is there, and its commit.

`preparation.json`, put first and once, says for which source and options a prefix is taken; `dataset.json`, put
last and once, makes the data set visible.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.config_sections import PrepareConfig
from pipelines.dataset import (
    FORMAT,
    RECORD_KEY,
    SHARDS_KEY,
    SPLITS,
    VERSION,
    Dataset,
    Shard,
    canonical_json,
    load_from,
    shards_to_parquet,
    with_identity,
)
from pipelines.errors import UserError, printable, without_password
from pipelines.shards import sha256
from pipelines.storage import ObjectMissing, Storage, StorageError

CLAIM_KEY = "preparation.json"
_STATE = "source_state"
_LIBRARIES = "libraries"
_NAMED = 3
_OPTIONS = {
    "image_member": "--image",
    "label_member": "--label",
    "source_fingerprint": "what SOURCE holds, by its fingerprint",
}


def check_writable(out: str) -> None:
    """Raise `UserError` where no data set can be written to, before it is tried for long."""
    if out.lower().startswith(("https://", "http://")):
        raise UserError(f"out: {printable(without_password(out))}: is read only: write to s3:// or a folder")


def finished(storage: Storage, options: Mapping[str, Any], state: str = "") -> Dataset | None:
    """The data set that stands there, or None; `UserError` if it was made of another source or otherwise, or if the
    source has changed in place since (`pipelines.sources.Source.state`).
    """
    if not (storage.exists(RECORD_KEY) and storage.exists(SHARDS_KEY)):
        return None
    dataset = load_from(storage)
    _check_same(storage, dataset.record.get("preparation", {}), options)
    with contextlib.suppress(ObjectMissing, ValueError, TypeError, RecursionError):
        _check_state(storage, dict(json.loads(storage.get(CLAIM_KEY))), state, f"delete {CLAIM_KEY} there")
    return dataset


def claim(
    storage: Storage, options: Mapping[str, Any], state: str = "", libraries: str = "", *, take: bool = True
) -> None:
    """Take the prefix for this source and these options, or find that it is taken for just them. The claim holds
    the source's state as well, and the libraries that make the bytes, which are of one place and no part of what a
    data set is. With `take=False`: look only.

    Raises `UserError` where it is taken otherwise. Other libraries may make other bytes of the same image, so that
    two of them would write over each other's shards until the set is whole; then nobody writes any more.
    """
    asides = {name: value for name, value in ((_STATE, state), (_LIBRARIES, libraries)) if value}
    claim = canonical_json({**options, **asides})
    try:
        taken = storage.get(CLAIM_KEY)
    except ObjectMissing:
        # of a finished data set somebody took the claim away
        for split in () if storage.exists(RECORD_KEY) else SPLITS:
            for there in storage.list(f"{split}/")[:1]:
                raise UserError(
                    f"{storage.uri}/{there.key}: is in the way, and belongs to no data set of this program: "
                    "choose another --out"
                ) from None
        if not take:
            return
        taken = claim if storage.put_if_absent(CLAIM_KEY, claim) else storage.get(CLAIM_KEY)
    try:
        claimed = dict(json.loads(taken))
        known = {name: claimed[name] for name in claimed if name not in (_STATE, _LIBRARIES)}
        _check_same(storage, known, options, begun=not storage.exists(RECORD_KEY))
        _check_state(storage, claimed, state, "delete all that lies there, to begin anew")
        theirs = claimed.get(_LIBRARIES) or libraries  # claims of earlier versions name none
        if libraries and theirs != libraries and not storage.exists(RECORD_KEY):
            raise UserError(
                f"{storage.uri}: was begun with {printable(str(theirs))}, and here are {libraries}, which may make "
                "other bytes of the same images: go on with those, choose another --out, or, if nobody works on "
                "it, delete all that lies there"
            )
    except (ValueError, TypeError, RecursionError):
        # what no claim belongs to any more is in the way of everybody, but of a whole set
        what = "it" if storage.exists(RECORD_KEY) else "all that lies there, if nobody works on it"
        raise UserError(
            f"{storage.uri}/{CLAIM_KEY}: is damaged: delete {what}, or choose another --out"
        ) from None


def _check_same(
    storage: Storage, there: Mapping[str, Any], asked: Mapping[str, Any], *, begun: bool = False
) -> None:
    names = sorted({*there, *asked})
    differing = [name for name in names if there.get(name) != asked.get(name)]
    if differing:
        what = ", ".join(
            f"{_spelt(name)} ({_short(there.get(name))} there, {_short(asked.get(name))} asked for)"
            for name in differing[:_NAMED]
        )
        if len(differing) > _NAMED:
            what += f" and {len(differing) - _NAMED} more"
        if begun:
            raise UserError(
                f"{storage.uri}: was begun otherwise: {what}; go on the same way, choose another --out, or, if "
                "nobody works on it, delete all that lies there"
            )
        raise UserError(
            f"{storage.uri}: holds a data set that was prepared otherwise: {what}; "
            "prepare it the same way, or choose another --out"
        )


def _spelt(name: str) -> str:
    """An option of a record as the user writes it."""
    if name in PrepareConfig.model_fields:
        return f"prepare.{name}"
    return _OPTIONS.get(name, name)


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:8]}…"


def _check_state(storage: Storage, claim: Mapping[str, Any], state: str, else_do: str) -> None:
    """Claims of earlier versions name no state."""
    if state and claim.get(_STATE, state) != state:
        raise UserError(
            f"{storage.uri}: was prepared from files of these names and sizes, and these have other times of "
            "change or ETags: they may hold other images. Choose another --out, or, if their content is the same, "
            f"{else_do}"
        )


def commit(
    storage: Storage,
    name: str,
    shape: tuple[int, int, int],
    levels: int,
    classes: tuple[str, ...],
    options: Mapping[str, Any],
    shards: list[Shard],
) -> None:
    """Put the list of shards, then the record, which makes the data set visible.

    Raises `UserError` where a record stands that names another list, and leaves that list alone.
    """
    listing = shards_to_parquet(shards)
    if storage.exists(RECORD_KEY) and _named_listing(storage) != sha256(listing):
        raise UserError(
            f"{storage.uri}/{SHARDS_KEY}: can't be made again here: {RECORD_KEY} names another list of shards than "
            "these make; choose another --out"
        )
    storage.put(SHARDS_KEY, listing)
    splits = {}
    for split in SPLITS:
        chosen = [shard for shard in shards if shard.split == split]
        splits[split] = {"count": sum(shard.count for shard in chosen), "shards": len(chosen)}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "shape": list(shape),
        "levels": levels,
        "classes": list(classes),
        "splits": splits,
        "preparation": dict(options),
        "shards_sha256": sha256(listing),
    }
    # whoever is second made the same record, which `prepare` then reads
    text = json.dumps(with_identity(record), indent=2, ensure_ascii=False)
    storage.put_if_absent(RECORD_KEY, text.encode())


def _named_listing(storage: Storage) -> str | None:
    try:
        record = json.loads(storage.get(RECORD_KEY))
    except (ValueError, RecursionError, ObjectMissing):
        return None
    return record.get("shards_sha256") if isinstance(record, dict) else None


def discard(storage: Storage, objects: Iterable[tuple[str, str]]) -> None:
    """Delete each shard's tar and index, and the claim."""
    keys = [key for tar, index in objects for key in (index, tar)]
    with contextlib.suppress(StorageError):
        storage.delete([*keys, CLAIM_KEY])
