"""What a reader keeps and fetches ahead: as much as its bound lets it, and not a shard more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.cache import WeightedLRU
from pipelines.dataset import Dataset
from pipelines.shard_reader import ShardReader, fetch_verified
from pipelines.storage import Memory, Storage, new_memory
from tests.support.data import dataset_of


def filled(**weights: int) -> WeightedLRU[str, str]:
    cache: WeightedLRU[str, str] = WeightedLRU(100)
    for key, weight in weights.items():
        cache.get(key, str, lambda value, weight=weight: weight)  # type: ignore[misc]
    return cache


def kept(cache: WeightedLRU[str, str]) -> str:
    return "".join(key for key in "abcdef" if key in cache)


@pytest.mark.parametrize(
    ("keys", "left", "num_bytes"), [("ac", "ac", 40), ("", "", 0), ("abcd", "abc", 60), ("x", "", 0)]
)
def test_a_cache_keeps_what_it_is_told_to_retain(keys: str, left: str, num_bytes: int) -> None:
    cache = filled(a=10, b=20, c=30)
    cache.retain(set(keys))
    assert (kept(cache), cache.num_bytes, len(cache)) == (left, num_bytes, len(left))


@pytest.mark.parametrize(
    ("max_bytes", "keep", "left", "reached"),
    [(60, 0, "abc", True), (59, 0, "bc", True), (29, 0, "", True), (29, 1, "c", False), (0, 9, "abc", False)],
)
def test_a_cache_shrinks_from_its_oldest(max_bytes: int, keep: int, left: str, reached: bool) -> None:
    cache = filled(a=10, b=20, c=30)
    assert cache.shrink(max_bytes, keep) is reached
    assert (kept(cache), cache.num_bytes) == (left, sum({"a": 10, "b": 20, "c": 30}[key] for key in left))


class Watched:
    """Six shards of nearly the same size, a reader with room for a number of them, and which were fetched."""

    def __init__(self, folder: Path, room: float) -> None:
        self.dataset: Dataset = dataset_of(folder, [4] * 6, shape=(3, 64, 64))[0]
        sizes = [shard.num_bytes for shard in self.dataset.splits["train"]]
        # shards that are here take their index beside
        assert max(sizes) < 1.1 * min(sizes)
        self.fetched: list[int] = []
        self.reader = ShardReader(
            self.dataset, "train", int(room * max(sizes)), parallel=1, fetch=self._fetch
        )

    def _fetch(
        self, storage: Storage, key: str, expected_sha256: str, memory: Memory = new_memory
    ) -> memoryview:
        if key.endswith(".tar"):
            self.fetched.append(int(key[-5]))
        else:
            # it is kept as long as the shard, whose memory it must not take
            assert memory is new_memory
        return fetch_verified(storage, key, expected_sha256, memory)

    def read(self, *shards: int) -> None:
        for shard in shards:
            self.reader.read(shard, np.array([0]))

    def ahead(self, shards: range | list[int], in_use: int) -> None:
        """Fetch ahead, and wait until that is done."""
        self.reader.fetch_ahead(shards, in_use)
        self.reader._fetchers.submit(int).result()


@pytest.mark.parametrize(
    ("room", "fetched"), [(0.5, []), (1.5, [0]), (3.5, [0, 1, 2]), (99, [0, 1, 2, 3, 4, 5])]
)
def test_shards_are_fetched_ahead_as_far_as_the_memory_reaches(
    tmp_path: Path, room: float, fetched: list[int]
) -> None:
    watched = Watched(tmp_path, room)
    watched.ahead(range(6), in_use=0)
    assert watched.fetched == fetched
    # what is on its way takes its room, whoever asks again
    watched.ahead(range(6), in_use=0)
    assert watched.fetched == fetched


def test_room_is_made_of_shards_that_are_not_in_use(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 2.5)
    watched.read(0, 1)
    watched.ahead([2], in_use=2)
    assert watched.fetched == [0, 1]
    watched.ahead([1, 2, 3], in_use=1)
    assert watched.fetched == [0, 1, 2]
    watched.read(1, 2)
    assert watched.fetched == [0, 1, 2]
    watched.read(0)
    assert watched.fetched == [0, 1, 2, 0]


def test_a_reader_retains_what_it_is_told_to(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 99)
    watched.read(0, 1, 2)
    watched.reader.retain({1})
    assert watched.reader.cached_bytes < 1.5 * watched.dataset.splits["train"][1].num_bytes
    watched.read(1, 0)
    assert watched.fetched == [0, 1, 2, 0]
