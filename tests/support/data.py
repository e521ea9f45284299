"""Small data sets, image folders and failing storage for the tests of the data plane."""

from __future__ import annotations

import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.columns import Texts
from pipelines.dataset import (
    FORMAT,
    RECORD_KEY,
    SHARDS_KEY,
    VERSION,
    Dataset,
    Shard,
    shards_to_parquet,
    with_identity,
)
from pipelines.entries import Entries, Entry
from pipelines.images import encode_png
from pipelines.shards import PackedShard, Sample, pack, sha256
from pipelines.storage import Hashed, Memory, ObjectInfo, Storage, new_memory, open_storage


def random_images(count: int, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def hashed(data: bytes) -> Hashed:
    """As a storage gives it."""
    return Hashed(memoryview(data), sha256(data))


def write_image(path: Path, pixels: NDArray[np.uint8], **options: object) -> None:
    """One image file of the kind that the suffix says; `pixels` is [H, W] or [H, W, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]


def image_bytes(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    with io.BytesIO() as file:
        picture.save(file, format=kind, **options)
        return file.getvalue()


def packed(images: NDArray[np.uint8], first: int = 0) -> PackedShard:
    return pack(
        Sample(f"sample-{first + number:06d}", encode_png(image), number % 10)
        for number, image in enumerate(images)
    )


def put_dataset(
    uri: str | Path, shards: dict[str, Sequence[PackedShard]], shape: tuple[int, int, int]
) -> Dataset:
    """A data set of ready-made shards, which may be wrong in every way but their hashes."""
    storage = open_storage(str(uri))
    rows = []
    for split, members in shards.items():
        for number, shard in enumerate(members):
            key, index_key = f"{split}/shard-{number:06d}.tar", f"{split}/shard-{number:06d}.index.parquet"
            storage.put(key, shard.tar)
            storage.put(index_key, shard.index)
            hashes = sha256(shard.tar), sha256(shard.index)
            rows.append(Shard(split, key, index_key, shard.count, len(shard.tar), *hashes))
    listing = shards_to_parquet(rows)
    storage.put(SHARDS_KEY, listing)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "name": "test data",
        "shape": list(shape),
        "levels": 256,
        "classes": [str(number) for number in range(10)],
        "splits": {
            split: {"count": sum(s.count for s in members), "shards": len(members)}
            for split, members in shards.items()
        },
        "preparation": {},
        "shards_sha256": sha256(listing),
    }
    storage.put(RECORD_KEY, json.dumps(with_identity(record)).encode())
    return Dataset.load(str(uri))


def edit_record(uri: str | Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record of a data set; it then tells no identity, as those of earlier versions."""
    storage = open_storage(str(uri))
    record = json.loads(storage.get(RECORD_KEY))
    record.pop("identity", None)
    change(record)
    storage.put(RECORD_KEY, json.dumps(record).encode())


def dataset_of(
    uri: str | Path, counts: Sequence[int], shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0
) -> tuple[Dataset, NDArray[np.uint8]]:
    """A data set with these train shards (and three test samples), and its train images in stored order."""
    images = random_images(sum(counts), shape, seed)
    starts = np.cumsum([0, *counts])
    train = [packed(images[a:b], int(a)) for a, b in pairwise(starts)]
    return put_dataset(uri, {"train": train, "test": [packed(images[:3])]}, shape), images


@dataclass(frozen=True)
class _Given:
    entries: Sequence[Entry]

    @property
    def keys(self) -> Texts:
        return Texts.of(entry.key for entry in self.entries)

    def entry(self, row: int, label: int) -> Entry:
        return self.entries[row]

    def groups(self) -> Iterator[tuple[str, int]]:
        return ((entry.group, 1) for entry in self.entries)


def entries_of(entries: Sequence[Entry], parts: int = 1) -> Entries:
    """A source's entries as given, held in so many parts."""
    cuts = [number * len(entries) // parts for number in range(parts + 1)]
    labels = np.array([entry.label for entry in entries], np.int64)
    return Entries([_Given(entries[a:b]) for a, b in pairwise(cuts)], labels)


class WatchedStorage:
    """A storage that counts what is read and written, and lets a test change or refuse it."""

    def __init__(
        self,
        inner: Storage,
        on_get: Callable[[str, bytes, int], bytes] | None = None,
        on_put: Callable[[str], None] | None = None,
        on_range: Callable[[str, bytes, int], bytes] | None = None,
    ) -> None:
        self.inner = inner
        self.gets: Counter[str] = Counter()
        self.ranges: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()
        self.puts: list[str] = []
        self._on_get = on_get or (lambda key, data, time: data)
        self._on_put = on_put or (lambda key: None)
        self._on_range = on_range or (lambda key, data, time: data)

    @property
    def uri(self) -> str:
        return self.inner.uri

    def child(self, *parts: str) -> Storage:
        return self.inner.child(*parts)

    def get(self, key: str) -> bytes:
        with self._lock:
            self.gets[key] += 1
            time = self.gets[key]
        return self._on_get(key, self.inner.get(key), time)

    def get_hashed(self, key: str, memory: Memory = new_memory) -> Hashed:
        data = self.get(key)
        into = memory(len(data))
        into[:] = data
        return Hashed(into, sha256(data))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._lock:
            self.ranges.append((key, start, length))
            time = self.ranges.count((key, start, length))
        return self._on_range(key, self.inner.get_range(key, start, length), time)

    def put(self, key: str, data: bytes) -> None:
        self._on_put(key)
        self.inner.put(key, data)
        self.puts.append(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._on_put(key)
        won = self.inner.put_if_absent(key, data)
        if won:
            self.puts.append(key)
        return won

    def exists(self, key: str) -> bool:
        return self.inner.exists(key)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return self.inner.list(prefix)

    def delete(self, keys: Iterable[str]) -> None:
        self.inner.delete(keys)
