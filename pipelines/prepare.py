"""From images to a data set: plan, claim the prefix, write the shards, commit.

Everything follows from (source, options), so whoever comes second, after a kill or at the same time, writes
the same objects, on however many workers. `preparation.json`, put first and once, says for which source and
options a prefix is taken; `dataset.json`, put last and once, makes the data set visible.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from typing import Any

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
)
from pipelines.errors import UserError
from pipelines.prepare_shards import Job, Recipe, ShardPlan, Workers, any_colour, convert, make_shard
from pipelines.preprocess import Preprocessing
from pipelines.shards import sha256
from pipelines.sources import Entry, Source, open_source
from pipelines.storage import ObjectMissing, Storage, StorageError, open_storage

log = logging.getLogger(__name__)

CLAIM_KEY = "preparation.json"
DEFAULT_SAMPLES_PER_SHARD = 1024
Progress = Callable[[int, int], None]
# of groups that are read as a whole, so many shards' worth are mixed; each is read for as many shards
_SHARDS_A_WINDOW = 8
# images of one task that looks for colour
_IMAGES_A_LOOK = 64


def prepare(
    source: str,
    out: str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    levels: int | None = None,
    test_fraction: float = 0.1,
    shard_count: int | None = None,
    samples_per_shard: int | None = None,
    seed: int = 0,
    labels: str | None = None,
    image: str | None = None,
    label: str | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> Dataset:
    """Make the data set `out` from `source`, or finish it, or find it finished.

    `source`, `labels`, `image`, `label`: see `pipelines.sources.open_source`. `image_size`: side of the square
    to make of every image; None keeps their size, which must then be one. `channels`: 1 or 3; None takes 3 if
    any image has colour. `levels`: values a channel; None takes the source's own. A sample is held out as test
    where a hash of (seed, key) falls below `test_fraction`. `shard_count` (of the train split; test shards are
    about as large) or `samples_per_shard` (1,024 unless said), not both. `progress(done, total)` is called as
    samples are done. `workers` makes the shards; without it they are made here, one by one.

    Raises `UserError` on a bad option, source or image, and where `out` holds a data set that was made
    otherwise. On a bad image nothing of what was written stays.
    """
    _check_options(test_fraction, shard_count, samples_per_shard)
    storage = open_storage(out)
    found = open_source(source, labels=labels, image=image, label=label)
    preprocessing = _preprocessing(found, image_size, channels, levels, workers)
    options = {
        "source": found.kind,
        "source_fingerprint": found.fingerprint,
        **preprocessing.describe(),
        "test_fraction": test_fraction,
        "shard_count": shard_count,
        "samples_per_shard": None if shard_count else samples_per_shard or DEFAULT_SAMPLES_PER_SHARD,
        "seed": seed,
    }
    if (existing := finished(storage, options)) is not None:
        if not (damage := incomplete(existing)):
            return existing
        log.warning("%s: made again", "; ".join(damage))
    plans = plan_shards(found.entries, seed, test_fraction, shard_count, samples_per_shard)
    claim(storage, options)
    try:
        shards, shape = _write_shards(storage, plans, found, preprocessing, progress, workers)
    except StorageError:
        raise  # what is written is right, and the next call goes on from it
    except UserError:
        # another process may have finished the same data set meanwhile
        if not storage.exists(RECORD_KEY):
            _discard(storage, plans)
        raise
    commit(storage, found.name, shape, preprocessing.levels, found.classes, options, shards)
    dataset = finished(storage, options)
    assert dataset is not None
    return dataset


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
                f"test_fraction: {test_fraction} of {total} images leaves the {split} split empty: "
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


def _check_options(test_fraction: float, shard_count: int | None, samples_per_shard: int | None) -> None:
    if not 0.0 < test_fraction < 1.0:
        raise UserError(f"test_fraction: must lie between 0 and 1, got {test_fraction!r}")
    if shard_count is not None and samples_per_shard is not None:
        raise UserError("shard_count, samples_per_shard: give one of them, not both")
    for name, value in (("shard_count", shard_count), ("samples_per_shard", samples_per_shard)):
        if value is not None and value < 1:
            raise UserError(f"{name}: must be at least 1, got {value!r}")


def _preprocessing(
    source: Source,
    image_size: int | None,
    channels: int | None,
    levels: int | None,
    workers: Workers | None,
) -> Preprocessing:
    levels = source.levels if levels is None else levels
    try:
        if channels is None:
            # a bad option is reported before the files are looked at
            Preprocessing(image_size, 1, levels)
            channels = 3 if _in_colour(source, workers) else 1
        return Preprocessing(image_size, channels, levels)
    except ValueError as error:
        raise UserError(str(error)) from None


def _in_colour(source: Source, workers: Workers | None) -> bool:
    """Colour data show it at their first image; only grey ones are looked through to the end."""
    if workers is None or any_colour(source.reader, source.entries[:1]):
        return any_colour(source.reader, source.entries)
    pieces = (
        source.entries[start : start + _IMAGES_A_LOOK]
        for start in range(0, len(source.entries), _IMAGES_A_LOOK)
    )
    with contextlib.closing(workers(partial(any_colour, source.reader), pieces)) as looks:
        return any(colour for _, colour in looks)


def finished(storage: Storage, options: Mapping[str, Any]) -> Dataset | None:
    """The data set that stands there, or None; `UserError` if it was made of another source or otherwise."""
    if not (storage.exists(RECORD_KEY) and storage.exists(SHARDS_KEY)):
        return None
    dataset = load_from(storage)
    _check_same(storage, dataset.record.get("preparation", {}), options)
    return dataset


def incomplete(dataset: Dataset) -> list[str]:
    """The objects of a data set that are missing or of another size, by one listing a split; a phrase each.

    A change of bytes is not seen; `ddpm verify` reads them.
    """
    damage = []
    for split, shards in dataset.splits.items():
        sizes = {info.key: info.num_bytes for info in dataset.storage.list(f"{split}/")}
        for shard in shards:
            if "://" in shard.key:
                continue  # a tar that stays elsewhere
            if sizes.get(shard.key) != shard.num_bytes:
                damage.append(f"{dataset.uri_of(shard)} is missing or not {shard.num_bytes} bytes long")
            if shard.index_key not in sizes:
                damage.append(f"{dataset.uri}/{shard.index_key} is missing")
    return damage


def claim(storage: Storage, options: Mapping[str, Any]) -> None:
    """Take the prefix for this source and these options, or find that it is taken for just them."""
    claim = canonical_json(options)
    try:
        taken = storage.get(CLAIM_KEY)
    except ObjectMissing:
        for split in SPLITS:
            for there in storage.list(f"{split}/")[:1]:
                raise UserError(
                    f"{storage.uri}/{there.key}: is in the way, and belongs to no data set of this program: "
                    "choose another --out"
                ) from None
        taken = claim if storage.put_if_absent(CLAIM_KEY, claim) else storage.get(CLAIM_KEY)
    try:
        _check_same(storage, dict(json.loads(taken)), options)
    except (ValueError, TypeError, RecursionError):
        raise UserError(
            f"{storage.uri}/{CLAIM_KEY}: is damaged: delete it, or choose another --out"
        ) from None


def _check_same(storage: Storage, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    names = sorted({*there, *asked})
    differing = [name for name in names if there.get(name) != asked.get(name)]
    if differing:
        what = ", ".join(
            f"{name} ({there.get(name)} there, {asked.get(name)} asked for)" for name in differing
        )
        raise UserError(
            f"{storage.uri}: holds a data set that was prepared otherwise: {what}; "
            "prepare it the same way, or choose another --out"
        )


def _write_shards(
    storage: Storage,
    plans: list[ShardPlan],
    source: Source,
    preprocessing: Preprocessing,
    progress: Progress | None,
    workers: Workers | None,
) -> tuple[list[Shard], tuple[int, int, int]]:
    sizes = {info.key: info.num_bytes for split in SPLITS for info in storage.list(f"{split}/")}
    # every image must have the shape of the first one, also where an earlier attempt wrote that one
    shape = convert(source.reader, plans[0].entries[0], preprocessing, None).shape
    recipe = Recipe(storage, source.reader, preprocessing, shape)
    jobs = [
        Job(number, plan, sizes.get(plan.key) if plan.index_key in sizes else None)
        for number, plan in enumerate(plans)
    ]
    total, done = sum(len(plan.entries) for plan in plans), 0
    shards: dict[int, Shard] = {}

    def tell(samples: int) -> None:
        if progress is not None:
            progress(done + samples, total)

    def here() -> Generator[tuple[Job, Shard], None, None]:
        for job in jobs:
            yield job, make_shard(recipe, job, tell)

    made = here() if workers is None else workers(partial(make_shard, recipe), jobs)
    with contextlib.closing(made):
        for job, shard in made:
            shards[job.number] = shard
            done += len(job.plan.entries)
            tell(0)
    if workers is not None:
        _check_arrived(storage, shards.values())
    return [shards[job.number] for job in jobs], shape


def _check_arrived(storage: Storage, shards: Iterable[Shard]) -> None:
    """A folder of one machine is not that of another, and the record must not name what nobody can read."""
    sizes = {info.key: info.num_bytes for split in SPLITS for info in storage.list(f"{split}/")}
    for shard in shards:
        if sizes.get(shard.key) != shard.num_bytes or shard.index_key not in sizes:
            raise StorageError(
                f"{storage.uri}/{shard.key}: was written by a worker and is not to be seen here: write to S3 or to "
                "a folder that all machines share, or prepare in this process (--local)"
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
    """Put the list of shards, then the record, which makes the data set visible."""
    listing = shards_to_parquet(shards)
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
    storage.put_if_absent(RECORD_KEY, json.dumps(record, indent=2, ensure_ascii=False).encode())


def _discard(storage: Storage, plans: list[ShardPlan]) -> None:
    keys = [key for plan in plans for key in (plan.index_key, plan.key)]
    with contextlib.suppress(StorageError):
        storage.delete([*keys, CLAIM_KEY])
