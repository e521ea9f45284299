"""A data set of WebDataset tars that stay where they are: their indexes and the record, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.columns import Integers, Passed, pieces
from pipelines.dataset import Dataset, Shard, has_control
from pipelines.duplicates import hashes_of, same_content
from pipelines.errors import UserError, printable
from pipelines.images import check_levels
from pipelines.index_scan import SCANS, Scanned, Scans, scan_tar
from pipelines.labels import number_labels
from pipelines.prepare import Progress
from pipelines.prepare_commit import check_writable, claim, commit, finished
from pipelines.prepare_plan import keyed_hash
from pipelines.prepare_shards import MAX_NAMED, Bad, BadImages, Workers
from pipelines.shards import INDEX_ENCODINGS, Columns, Encoding, index_of, sha256
from pipelines.source_find import Found, find
from pipelines.source_tar import LABEL_EXTENSION
from pipelines.sources import DIGITS, fingerprint, is_array, state_of, warn_passed_over
from pipelines.storage import Storage, StorageError, open_storage

log = logging.getLogger(__name__)

# what makes the bytes of an index, see `prepare_commit.claim`
_LIBRARIES = f"PyArrow {pa.__version__}"


def index_tars(
    source: str,
    out: str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    levels: int | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    image: str | None = None,
    label: str | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> Dataset:
    """Make the data set `out` of the tars of `source`, which are read once and not copied.

    Every image must be an 8-bit grey or RGB PNG or a JPEG, and all of one shape (squares of `image_size` and of so
    many `channels` where these are given). Whole tars are held out: those where a hash of (seed, name) falls below
    `test_fraction`, and at least one. A tar below `out` is named by its key, so that both can be moved together,
    others by their URI. Other arguments are those of `pipelines.prepare.prepare`; `progress` counts tars.

    What was found in a tar is kept below `out` until the data set is whole, so that a second call reads only the
    rest; a finished data set gets back an index that it lost.

    Raises `UserError` naming the tar and the member that is not taken, two tars of equal content, or a sample of
    one key and content that is in both splits.
    """
    levels = 256 if levels is None else levels
    try:
        check_levels(levels)
    except ValueError as error:
        raise UserError(f"prepare.{error}") from None
    if source == DIGITS or is_array(source):
        raise UserError(f"source: {printable(source)}: --index-only is for .tar files")
    found = find(source)
    if found.kind != "tar":
        raise UserError(f"source: {found.where}: --index-only is for .tar files, and this is a {found.kind}")
    if len(found.keys) < 2:
        raise UserError(f"source: {found.where}: --index-only holds out whole tars, so it needs two at least")
    _check_names(found)
    for name, value in (("--image", image), ("--label", label)):
        if value is not None and printable(value) != value:
            raise UserError(f"{name} {printable(value)}: is no UTF-8 text that can be shown")
    check_writable(out)
    storage = open_storage(out)
    options: dict[str, Any] = {
        "source": "index-only",
        "source_fingerprint": fingerprint(f"{key!r} {size}" for key, size in sorted(found.keys.items())),
        "image_size": image_size,
        **({"channels": channels} if channels else {}),
        "levels": levels,
        "test_fraction": test_fraction,
        "seed": seed,
        "image_member": image,
        "label_member": label or LABEL_EXTENSION,
    }
    scan = partial(scan_tar, found.storage, image=image, label=label)
    state = state_of(found.versions)
    if (existing := finished(storage, options, state)) is not None:
        _complete(existing, found, scan)
        if left := [info.key for info in storage.list(SCANS)]:
            storage.delete(left)  # of one that was killed when all was done
        return existing
    claim(storage, options, state, _LIBRARIES, take=False)
    scans = Scans(storage, image, label)
    try:
        scanned = _scan_all(found, scans, scan, progress, workers)
        made = _assign(found, scanned, options)
    except UserError as error:
        # what failed goes on from the scans; what was a mistake leaves nothing
        if not isinstance(error, StorageError) and error.exit_code == UserError.exit_code:
            storage.delete(map(scans.key_of, found.keys))
        raise
    claim(storage, options, state, _LIBRARIES)
    rows = []
    for shard, index in made.shards():
        storage.put(shard.index_key, index)
        rows.append(replace(shard, key=_key_of(storage, found.storage, shard.key)))
    commit(storage, printable(found.name), made.shape, levels, made.classes, options, rows)
    storage.delete(map(scans.key_of, found.keys))
    dataset = finished(storage, options, state)
    assert dataset is not None
    return dataset


def _check_names(found: Found) -> None:
    """The list of shards holds names as text, and a reader takes them from there."""
    for key in ("", *found.keys):
        try:
            key.encode()
            unquote(found.storage.uri, errors="strict")
        except UnicodeError:
            raise UserError(
                f"source: {printable(f'{found.where}/{key}'.rstrip('/'))}: its name is no UTF-8 text: rename it, "
                "or prepare without --index-only"
            ) from None
        if has_control(f"{found.storage.uri}/{key}"):
            raise UserError(
                f"source: {printable(f'{found.where}/{key}')}: its name has control characters: rename it, or "
                "prepare without --index-only"
            )


@dataclass(frozen=True)
class _Assigned:
    """The tars, each with its split, the key of its index and its labels."""

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    tars: list[tuple[str, str, Scanned, Integers]]

    def shards(self) -> Iterator[tuple[Shard, bytes]]:
        """Each with its index; a shard's key is that of its tar in the source."""
        for split, index_key, tar, numbers in self.tars:
            index = _index(tar, numbers, INDEX_ENCODINGS[0])
            count = len(tar.labels)
            shard = Shard(split, tar.key, index_key, count, tar.num_bytes, tar.sha256, sha256(index))
            yield shard, index


def _assign(found: Found, scanned: list[Scanned], options: Mapping[str, Any]) -> _Assigned:
    passed_over = Passed()
    for tar in scanned:
        passed_over.add(tar.passed_over.count, tar.passed_over.first)
    warn_passed_over(found.where, passed_over, "member", "of no sample")
    scanned = [tar for tar in scanned if len(tar.labels)]
    for one, two in same_content((tar.key, tar.sha256) for tar in scanned):
        raise UserError(
            f"source: {found.where}: {printable(one)} and {printable(two)} are one tar twice (equal SHA-256), and "
            "samples held out must be in no other: take one out"
        )
    shape = _one_shape(found.storage, scanned, options["image_size"], options.get("channels"))
    classes, numbers = number_labels(
        found.where,
        [tar.labels for tar in scanned],
        name_of=lambda place: _name_of(found.storage, scanned, place),
    )
    stops = list(accumulate(len(tar.labels) for tar in scanned))
    held_out = _held_out([tar.key for tar in scanned], options["seed"], options["test_fraction"])
    _check_apart(found, scanned, held_out)
    tars, counts = [], {"train": 0, "test": 0}
    for tar, stop in zip(scanned, stops, strict=True):
        split = "test" if tar.key in held_out else "train"
        index_key = f"{split}/shard-{counts[split]:06d}.index.parquet"
        counts[split] += 1
        tars.append((split, index_key, tar, numbers[stop - len(tar.labels) : stop]))
    tars.sort(key=lambda made: (made[0] != "train", made[1]))
    return _Assigned(shape, classes, tars)


def _check_apart(found: Found, scanned: list[Scanned], held_out: set[str]) -> None:
    """What is held out must be in no other tar, under its key."""
    kept = [tar for tar in scanned if tar.key in held_out]
    hashes = np.sort(np.concatenate([_hashes(tar) for tar in kept]))
    for tar in scanned:
        if tar.key in held_out:
            continue
        own = _hashes(tar)
        at = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
        for row in np.flatnonzero(hashes[at] == own).tolist():
            sample = _sample(tar, row)
            for other in kept:
                if any(
                    _sample(other, n) == sample for n in np.flatnonzero(_hashes(other) == own[row]).tolist()
                ):
                    raise UserError(
                        f"source: {found.where}: the sample {printable(sample[0])!r} is the same in "
                        f"{printable(tar.key)} and in {printable(other.key)}, which is held out: prepare without "
                        "--index-only"
                    )


def _sample(tar: Scanned, row: int) -> tuple[str, int, int]:
    return tar.keys[row], int(tar.columns["length"][row]), int(tar.columns["crc32c"][row])


def _hashes(tar: Scanned) -> NDArray[np.int64]:
    """Of what makes two samples the same."""
    numbers = (pieces(tar.columns[name]) for name in ("length", "crc32c"))
    return hashes_of(zip(tar.keys, *numbers, strict=True), len(tar.keys))


def _index(tar: Scanned, numbers: Integers, encoding: Encoding) -> bytes:
    columns: Columns = {"key": list(tar.keys), **tar.columns, "label": numbers}
    return index_of(columns, tar.sha256, tar.num_bytes, encoding)


def _complete(dataset: Dataset, found: Found, scan: Callable[[tuple[str, int]], Scanned]) -> None:
    """Put back what a finished data set has lost of its indexes; `UserError` where its tars are not these."""
    storage = dataset.storage
    tars = {_key_of(storage, found.storage, key): (key, size) for key, size in found.keys.items()}
    for split, shards in dataset.splits.items():
        there = {info.key for info in storage.list(f"{split}/")}
        for shard in shards:
            if shard.key not in tars:
                raise UserError(
                    f"{storage.uri}: is of the tar {printable(dataset.uri_of(shard))}, and those of {found.where} "
                    "lie elsewhere: choose another --out"
                )
            if shard.index_key in there:
                continue
            log.warning("%s/%s is missing: made again", storage.uri, shard.index_key)
            tar = scan(tars[shard.key])
            of_value = [_number_of(label, dataset.classes) for label in tar.labels.values]
            numbers = np.array(of_value, np.int64)[tar.labels.codes]
            made = (_index(tar, numbers, encoding) for encoding in INDEX_ENCODINGS)
            index = next((index for index in made if sha256(index) == shard.index_sha256), None)
            if tar.bad or index is None:
                raise UserError(
                    f"{storage.uri}/{shard.index_key}: is lost, and can't be made again as it was (the tar has "
                    "changed, or another PyArrow wrote it): choose another --out"
                )
            storage.put(shard.index_key, index)


def _number_of(label: str | None, classes: Sequence[str]) -> int:
    """The number that `number_labels` gave this label."""
    if label is None or label == "-1":
        return -1
    name = printable(label)
    return classes.index(name) if name in classes else int(label)


def _scan_all(
    found: Found,
    scans: Scans,
    scan: Callable[[tuple[str, int]], Scanned],
    progress: Progress | None,
    workers: Workers | None,
) -> list[Scanned]:
    result: dict[str, Scanned] = {}
    bad: list[Bad] = []
    kept = {info.key for info in scans.storage.list(SCANS)}
    for key, size in found.keys.items():
        if scans.key_of(key) in kept and (tar := scans.get(key, size, found.versions[key])):
            result[key] = tar
    tasks = [task for task in found.keys.items() if task[0] not in result]

    def left() -> Iterator[tuple[str, int]]:
        for task in tasks:
            if len(bad) >= MAX_NAMED:
                return
            yield task

    def here() -> Iterator[tuple[tuple[str, int], Scanned]]:
        for task in left():
            yield task, scan(task)

    if result and progress is not None:
        progress(len(result), len(found.keys))
    for (key, _), scanned in here() if workers is None else workers(scan, left()):
        result[key] = scanned
        bad += scanned.bad
        if not bad:
            scans.put(scanned, found.versions[key])
        if progress is not None:
            progress(len(result), len(found.keys))
    if bad:
        raise BadImages.of(bad, sum(len(tar.labels) for tar in result.values()))
    return [result[key] for key in sorted(result)]


def _name_of(storage: Storage, scanned: list[Scanned], place: int) -> str:
    for tar in scanned:
        if place < len(tar.labels):
            return printable(f"{storage.uri}/{tar.key}/{tar.keys[place]}")
        place -= len(tar.labels)
    raise AssertionError(place)


def _one_shape(
    storage: Storage, scanned: list[Scanned], image_size: int | None, channels: int | None
) -> tuple[int, int, int]:
    if len(scanned) < 2:
        raise UserError(f"source: {storage.uri}: fewer than two of its tars hold samples")
    first = scanned[0].shape
    assert first is not None
    size = first[1:] if image_size is None else (image_size, image_size)
    expected = (channels or first[0], *size)
    for tar in scanned:
        if tar.shape != expected:
            raise UserError(
                f"source: {printable(f'{storage.uri}/{tar.key}')}: its images are of shape "
                f"{list(tar.shape or ())}, not {list(expected)}: prepare without --index-only, which makes them one"
            )
    return first


def _held_out(keys: list[str], seed: int, test_fraction: float) -> set[str]:
    """Whole tars by the hash of their names; of both splits at least one."""
    ranked = sorted(keys, key=lambda key: (keyed_hash(seed, "split", key), key))
    below = sum(keyed_hash(seed, "split", key) < test_fraction * 2**64 for key in keys)
    return set(ranked[: min(max(below, 1), len(keys) - 1)])


def _key_of(out: Storage, tars: Storage, key: str) -> str:
    """How the record names a tar. A folder's URI is percent-encoded, an address on S3 is not."""
    on_disk = tars.uri.startswith("file:")
    uri = f"{tars.uri}/{quote(key) if on_disk else key}"
    if not uri.startswith(f"{out.uri}/"):
        return uri
    inside = uri.removeprefix(f"{out.uri}/")
    return unquote(inside) if on_disk else inside
