"""WebDataset tars as a source: a sample is the members that share a key; its image is one of them by extension."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.columns import Coded, CodedBuilder, Integers, Keys, Passed, TextsBuilder, mapped, narrow
from pipelines.duplicates import repeated
from pipelines.entries import Entries, checked
from pipelines.errors import UserError, printable
from pipelines.labels import number_labels
from pipelines.source_find import Found, Ranged, read_range
from pipelines.sources import (
    IMAGE_EXTENSIONS,
    Entry,
    Loaded,
    Source,
    fingerprint,
    sample_key,
    state_of,
    warn_passed_over,
)
from pipelines.storage import Storage
from pipelines.tars import DamagedTar, TarError, TarSample, buffered, comes_back, grouped, walk

if TYPE_CHECKING:
    from pipelines.prepare_shards import Workers

LABEL_EXTENSION = "cls"
_MAX_IMAGE_BYTES = 2**30
_MAX_LABEL_BYTES = 4096
_SCANS_AT_ONCE = 8
# what lies between the members of one sample is read along with them
_MAX_GAP_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class Listed:
    """One tar of a source: its key and size, and of its samples in order `names` (their keys in the tar), `keys`
    (in the data set), `images` (the image's extension), `labels` (None for none) and their members: `ends` says how
    many there are up to each sample's last one, and `extensions`, `offsets` and `sizes` are of all members.
    """

    key: str
    num_bytes: int
    names: Keys
    keys: Keys
    images: Coded[str]
    labels: Coded[str | None]
    ends: Integers
    extensions: Coded[str]
    offsets: Integers
    sizes: Integers
    passed_over: Passed

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, row: int) -> tuple[tuple[str, int, int], ...]:
        """Those of one sample, as `TarSample` has them."""
        start, stop = (int(self.ends[row - 1]) if row else 0), int(self.ends[row])
        return tuple(
            (self.extensions[n], int(self.offsets[n]), int(self.sizes[n])) for n in range(start, stop)
        )

    def without(self, extension: str) -> Listed:
        """As if no sample had such a member."""
        if extension not in self.extensions.values:
            return self
        stays = self.extensions.codes != self.extensions.values.index(extension)
        return replace(
            self,
            ends=narrow(np.cumsum(stays)[self.ends.astype(np.int64) - 1]),
            extensions=Coded(self.extensions.values, self.extensions.codes[stays]),
            offsets=self.offsets[stays],
            sizes=self.sizes[stays],
        )


def list_tar(
    storage: Ranged, key: str, num_bytes: int, image: str | None = None, label: str | None = None
) -> Listed:
    """The samples of one tar, each with its image's extension. Raises `UserError` naming tar and member."""
    where = printable(f"{storage.uri}/{key}")
    read = buffered(lambda start, length: read_range(storage, key, where, start, length), num_bytes)
    builder = TextsBuilder()
    images, labels, extensions = CodedBuilder[str](), CodedBuilder[str | None](), CodedBuilder[str]()
    ends, offsets, sizes = array("Q"), array("Q"), array("Q")
    passed_over = Passed()
    mistake: TarError | None = None
    try:
        for sample in grouped(walk(read, num_bytes), passed_over.append):
            builder.append(sample.key)
            images.append(image_of(sample, image))
            labels.append(_label_of(sample, label, read))
            for extension, offset, size in sample.members:
                extensions.append(extension)
                offsets.append(offset)
                sizes.append(size)
            ends.append(len(offsets))
    except TarError as error:
        mistake = error
    names = builder.build()
    # a sample in two places lacks something in one of them, which is the lesser mistake
    if again := sorted(repeated(names).values(), key=lambda rows: rows[1])[:1]:
        mistake = comes_back(names[again[0][0]])
    if mistake is not None:
        advice = "; copy it here once more, or leave it out" if isinstance(mistake, DamagedTar) else ""
        raise UserError(f"source: {where}: {mistake}{advice}") from None
    return Listed(
        key,
        num_bytes,
        names,
        mapped(names, sample_key),
        images.build(),
        labels.build(),
        narrow(ends),
        extensions.build(),
        narrow(offsets),
        narrow(sizes),
        passed_over,
    )


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


@dataclass(frozen=True, eq=False)
class _Tar:
    """What is needed of one tar to make its entries."""

    uri: str
    listed: Listed

    @property
    def keys(self) -> Keys:
        return self.listed.keys

    def entry(self, row: int, label: int) -> Entry:
        tar = self.listed
        name = printable(f"{self.uri}/{tar.key}/{tar.names[row]}")
        return Entry(tar.keys[row], label, name, (tar.key, tar.images[row], tar.members(row)))

    def groups(self) -> Iterator[tuple[str, int]]:
        yield "", len(self.listed)


def open_tars(found: Found, image: str | None, label: str | None, workers: Workers | None = None) -> Source:
    """The samples of these tars; the label is the member `.cls`, and is not carried as another member. `workers`
    read through the tars, a task each.
    """
    storage, where = found.storage, found.where
    tars, labels, passed_over = list[_Tar](), list[Coded[str | None]](), Passed()

    def lines() -> Iterator[str]:
        with contextlib.closing(_listed(found, image, label, workers)) as listing:
            for tar in listing:
                yield f"{tar.key!r} {tar.num_bytes}"
                for row, (name, text) in enumerate(zip(tar.names, tar.labels, strict=True)):
                    yield f"{name!r} {tar.members(row)!r} {text!r}"
                passed_over.add(tar.passed_over.count, tar.passed_over.first)
                labels.append(tar.labels)
                tars.append(_Tar(storage.uri, tar.without(label or LABEL_EXTENSION)))

    digest = fingerprint(lines())
    warn_passed_over(where, passed_over, "member", "of no sample")
    entries = Entries(tars)
    classes, numbers = number_labels(where, labels, name_of=lambda row: entries[row].name)
    return Source(
        kind="tar",
        name=printable(found.name),
        levels=256,
        classes=classes,
        entries=checked(where, entries.with_labels(numbers)),
        fingerprint=digest,
        reader=_TarReader(storage),
        state=state_of(found.versions),
    )


def _listed(
    found: Found, image: str | None, label: str | None, workers: Workers | None
) -> Generator[Listed, None, None]:
    """The tars in their order; what comes out of it is held until its turn."""
    scan = partial(_list, found.storage, image, label)
    tasks = list(found.keys.items())
    if workers is None:
        with ThreadPoolExecutor(_SCANS_AT_ONCE) as pool:
            yield from pool.map(scan, tasks)
        return
    ahead: dict[str, Listed] = {}
    left = iter(found.keys)
    turn = next(left, None)
    with contextlib.closing(workers(scan, tasks)) as made:
        for _, tar in made:
            ahead[tar.key] = tar
            while turn in ahead:
                yield ahead.pop(turn)
                turn = next(left, None)


def _list(storage: Storage, image: str | None, label: str | None, task: tuple[str, int]) -> Listed:
    return list_tar(storage, *task, image, label)
