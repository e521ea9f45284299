"""Which sample goes into which shard: a function of keys and options alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

from pipelines.dataset import SPLITS
from pipelines.errors import UserError
from pipelines.prepare_shards import ShardPlan
from pipelines.sources import Entry

DEFAULT_SAMPLES_PER_SHARD = 1024
# of groups that are read as a whole, so many shards' worth are mixed; each is read for as many shards
_SHARDS_A_WINDOW = 8


def plan_shards(
    entries: Iterable[Entry],
    seed: int,
    test_fraction: float,
    shard_count: int | None = None,
    samples_per_shard: int | None = None,
) -> list[ShardPlan]:
    """Which sample goes where. A sample's split is decided by its own key alone, so that it stays when
    others come and go; within a split samples lie in the order of a second hash, which mixes the classes
    over the shards. Where samples come in groups that are read as a whole, groups are taken in the order of a
    hash, as many as make some shards, and their samples are mixed: every shard then reads few of the groups.

    Raises `UserError` if a split would be empty, or would have more shards than samples.
    """
    members: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for entry in entries:
        held_out = keyed_hash(seed, "split", entry.key) < test_fraction * 2**64
        members["test" if held_out else "train"].append(entry)
    total = sum(len(chosen) for chosen in members.values())
    for split, chosen in members.items():
        if not chosen:
            raise UserError(
                f"prepare.test_fraction: {test_fraction} of {total} images leaves the {split} split empty: "
                "change it, or give more images"
            )
    num_train = len(members["train"])
    if shard_count is not None and shard_count > num_train:
        raise UserError(f"shard_count: {shard_count} shards are more than the {num_train} train samples")
    size = -(-num_train // shard_count) if shard_count else samples_per_shard or DEFAULT_SAMPLES_PER_SHARD
    plans = []
    for split, chosen in members.items():
        window_of = _windows(chosen, seed, size * _SHARDS_A_WINDOW)
        chosen.sort(
            key=lambda entry: (window_of[entry.group], keyed_hash(seed, "shard", entry.key), entry.key)
        )
        count = shard_count if shard_count and split == "train" else -(-len(chosen) // size)
        for number in range(count):
            piece = chosen[number * len(chosen) // count : (number + 1) * len(chosen) // count]
            stem = f"{split}/shard-{number:06d}"
            plans.append(ShardPlan(split, f"{stem}.tar", f"{stem}.index.parquet", tuple(piece)))
    return plans


def _windows(entries: Iterable[Entry], seed: int, least: int) -> dict[str, int]:
    """The window of each group; a window is of at least so many samples, the last one perhaps of fewer."""
    counts = Counter(entry.group for entry in entries)
    windows, window, filled = {}, 0, 0
    for group in sorted(counts, key=lambda group: (keyed_hash(seed, "group", group), group)):
        windows[group] = window
        filled += counts[group]
        if filled >= least:
            window, filled = window + 1, 0
    return windows


def keyed_hash(seed: int, purpose: str, key: str) -> int:
    """64 bits that depend on (seed, purpose, key) alone: BLAKE2b."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
