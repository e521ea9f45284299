"""WebDataset tars as a source: a sample is the members that share a key; its image is one of them by extension."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError, printable
from pipelines.source_find import Found, Ranged, read_range
from pipelines.sources import (
    IMAGE_EXTENSIONS,
    Entry,
    Loaded,
    Source,
    fingerprint,
    number_labels,
    ordered,
    sample_key,
    state_of,
    warn_passed_over,
)
from pipelines.storage import Storage
from pipelines.tars import TarError, TarSample, buffered, samples, walk

if TYPE_CHECKING:
    from pipelines.prepare_shards import Workers

LABEL_EXTENSION = "cls"
_MAX_IMAGE_BYTES = 2**30
_MAX_LABEL_BYTES = 4096
_SCANS_AT_ONCE = 8
# what lies between the members of one sample is read along with them
_MAX_GAP_BYTES = 2**20


@dataclass(frozen=True)
class Listed:
    """One tar of a source: its key and size, its samples in order, and the label of each (None for none)."""

    key: str
    num_bytes: int
    samples: tuple[TarSample, ...]
    labels: tuple[str | None, ...]
    images: tuple[str, ...]
    passed_over: tuple[str, ...]


def list_tar(
    storage: Ranged, key: str, num_bytes: int, image: str | None = None, label: str | None = None
) -> Listed:
    """The samples of one tar, each with its image's extension. Raises `UserError` naming tar and member."""
    where = printable(f"{storage.uri}/{key}")
    read = buffered(lambda start, length: read_range(storage, key, where, start, length), num_bytes)
    found, labels, images = [], [], []
    passed_over: list[str] = []
    try:
        for sample in samples(walk(read, num_bytes), passed_over):
            images.append(image_of(sample, image))
            labels.append(_label_of(sample, label, read))
            found.append(sample)
    except TarError as error:
        raise UserError(f"source: {where}: {error}") from None
    return Listed(key, num_bytes, tuple(found), tuple(labels), tuple(images), tuple(passed_over))


def image_of(sample: TarSample, image: str | None = None) -> str:
    """The extension of a sample's image: `image`, or the one that is an image's. Raises `TarError`."""
    there = [extension for extension, _, _ in sample.members]
    chosen = [image] if image is not None else [name for name in there if name in IMAGE_EXTENSIONS]
    name = printable(sample.key)
    if len(chosen) > 1:
        raise TarError(
            f"its sample {name!r} has {len(chosen)} images ({', '.join(chosen)}): say which with --image EXTENSION"
        )
    if not chosen or chosen[0] not in there:
        which = f"member .{image}" if image is not None else "image"
        raise TarError(f"its sample {name!r} has no {which}, only {', '.join(map(printable, there))}")
    _, _, size = next(member for member in sample.members if member[0] == chosen[0])
    if size > _MAX_IMAGE_BYTES:
        raise TarError(f"its sample {name!r} has an image of {size} bytes, which is none")
    return chosen[0]


def _label_of(sample: TarSample, label: str | None, read: Any) -> str | None:
    wanted = label or LABEL_EXTENSION
    for extension, offset, size in sample.members:
        if extension == wanted:
            if size > _MAX_LABEL_BYTES:
                raise TarError(f"its sample {printable(sample.key)!r} has a label of {size} bytes")
            try:
                return read(offset, size).decode().strip() or None
            except UnicodeDecodeError:
                raise TarError(f"its sample {printable(sample.key)!r} has a label that is no text") from None
    if label is not None:
        there = ", ".join(printable(extension) for extension, _, _ in sample.members)
        raise TarError(
            f"its sample {printable(sample.key)!r} has no member .{printable(label)}, only {there}"
        )
    return None


@dataclass(frozen=True)
class _TarReader:
    storage: Storage

    def load(self, entry: Entry) -> Loaded:
        key, image, members = entry.place
        start = min(offset for _, offset, _ in members)
        stop = max(offset + size for _, offset, size in members)
        if stop - start <= sum(size for _, _, size in members) + _MAX_GAP_BYTES:
            span = memoryview(read_range(self.storage, key, entry.name, start, stop - start))
            bodies = {name: bytes(span[at - start : at - start + size]) for name, at, size in members}
        else:
            bodies = {name: read_range(self.storage, key, entry.name, at, size) for name, at, size in members}
        return Loaded(bodies.pop(image), bodies)


def open_tars(found: Found, image: str | None, label: str | None, workers: Workers | None = None) -> Source:
    """The samples of these tars; the label is the member `.cls`, and is not carried as another member. `workers`
    read through the tars, a task each.
    """
    storage, where = found.storage, found.where
    scan = partial(_list, storage, image, label)
    tasks = list(found.keys.items())
    if workers is not None:
        by_key = {listed.key: listed for _, listed in workers(scan, tasks)}
        listed = [by_key[key] for key in found.keys]
    else:
        with ThreadPoolExecutor(_SCANS_AT_ONCE) as pool:
            listed = list(pool.map(scan, tasks))
    warn_passed_over(
        where, [name for tar in listed for name in tar.passed_over], "members that are no sample's"
    )
    places = [(tar, number) for tar in listed for number in range(len(tar.samples))]
    classes, numbers = number_labels(
        where,
        [tar.labels[number] for tar, number in places],
        name_of=lambda place: _name(storage, *places[place]),
    )
    wanted = label or LABEL_EXTENSION
    entries = [
        Entry(
            sample_key(tar.samples[number].key),
            class_number,
            _name(storage, tar, number),
            (
                tar.key,
                tar.images[number],
                tuple(member for member in tar.samples[number].members if member[0] != wanted),
            ),
        )
        for (tar, number), class_number in zip(places, numbers, strict=True)
    ]
    return Source(
        kind="tar",
        name=printable(found.name),
        levels=256,
        classes=classes,
        entries=ordered(where, entries),
        fingerprint=fingerprint(_listing(listed)),
        reader=_TarReader(storage),
        state=state_of(found.versions),
    )


def _list(storage: Storage, image: str | None, label: str | None, task: tuple[str, int]) -> Listed:
    return list_tar(storage, *task, image, label)


def _name(storage: Storage, tar: Listed, number: int) -> str:
    return printable(f"{storage.uri}/{tar.key}/{tar.samples[number].key}")


def _listing(listed: Iterable[Listed]) -> Iterator[str]:
    for tar in listed:
        yield f"{tar.key!r} {tar.num_bytes}"
        for sample, label in zip(tar.samples, tar.labels, strict=True):
            yield f"{sample.key!r} {sample.members!r} {label!r}"
