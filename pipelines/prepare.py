"""From images to a data set: plan, claim the prefix, write the shards, commit.

Everything follows from (source, options), so whoever comes second, after a kill or at the same time, writes
the same objects, on however many workers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path

from pipelines.dataset import RECORD_KEY, SPLITS, Dataset, Shard
from pipelines.errors import UserError, printable
from pipelines.libraries import libraries
from pipelines.png import PngEncoder, check_encoder
from pipelines.prepare_commit import check_writable, claim, commit, discard, finished
from pipelines.prepare_plan import DEFAULT_SAMPLES_PER_SHARD, Plan, plan_shards
from pipelines.prepare_shards import (
    MAX_NAMED,
    Bad,
    BadImage,
    BadImages,
    Job,
    Recipe,
    Refused,
    Workers,
    any_colour,
    convert,
    make_shard,
)
from pipelines.preprocess import Preprocessing
from pipelines.source_find import local_path
from pipelines.sources import DIGITS, Source, open_source
from pipelines.storage import Storage, StorageError, open_storage

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
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
    png_encoder: PngEncoder = "pillow",
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
    about as large) or `samples_per_shard` (1,024 unless said), not both. `png_encoder`: of images that do not keep
    their bytes; see `pipelines.png.encode_pngs`. `progress(done, total)` is called as samples are done. `workers`
    makes the shards; without it they are made here, one by one.

    Raises `UserError` on a bad option, source or image, and where `out` holds a data set that was made
    otherwise. Of bad images the first 20 are named, a line each (one for all that are only of another size), and
    nothing of what was written stays. After any other error what is written stays, and the next call goes on from
    it.
    """
    _check_options(test_fraction, shard_count, samples_per_shard)
    check_writable(out)
    storage = open_storage(out)
    if source != DIGITS and _same_folder(source, out):
        raise UserError(f"out: {printable(out)} is the source itself: choose another --out")
    found = open_source(source, labels=labels, image=image, label=label, workers=workers)
    if found.kind in ("tar", "parquet") and _lies_in(source, storage):
        raise UserError(
            f"out: {printable(out)} lies in the source, which would then be another one: choose another --out"
        )
    preprocessing = _preprocessing(found, image_size, channels, levels, png_encoder, workers)
    options = {
        "source": found.kind,
        "source_fingerprint": found.fingerprint,
        **preprocessing.describe(),
        "test_fraction": test_fraction,
        "shard_count": shard_count,
        "samples_per_shard": None if shard_count else samples_per_shard or DEFAULT_SAMPLES_PER_SHARD,
        "seed": seed,
    }
    existing = finished(storage, options, found.state)
    if existing is not None:
        if not (damage := existing.missing()):
            return existing
        log.warning("%s: made again", "; ".join(damage))
    plan = plan_shards(found.entries, seed, test_fraction, shard_count, samples_per_shard)
    claim(storage, options, found.state, libraries(png_encoder))
    try:
        shards, shape = _write_shards(storage, plan, existing, found, preprocessing, progress, workers)
    except BadImages:
        # whoever prepares the same meets the same images; of a finished set nothing is thrown away
        if not storage.exists(RECORD_KEY):
            discard(storage, plan.objects())
        raise
    commit(storage, found.name, shape, preprocessing.levels, found.classes, options, shards)
    dataset = finished(storage, options)
    assert dataset is not None
    return dataset


def _same_folder(source: str, out: str) -> bool:
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        return "://" not in source + out and Path(source).expanduser().samefile(Path(out).expanduser())
    return False


def _lies_in(source: str, out: Storage) -> bool:
    """Whether what is written to `out` would be found in `source`."""
    if source.startswith("s3://"):
        return f"{out.uri}/".startswith(f"{source.rstrip('/')}/")
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        return out.uri.startswith("file:") and local_path(out.uri).resolve().is_relative_to(
            local_path(source).resolve()
        )
    return False


def _check_options(test_fraction: float, shard_count: int | None, samples_per_shard: int | None) -> None:
    if not 0.0 < test_fraction < 1.0:
        raise UserError(f"prepare.test_fraction: must lie between 0 and 1, got {test_fraction!r}")
    if shard_count is not None and samples_per_shard is not None:
        raise UserError("shard_count, samples_per_shard: give one of them, not both")
    for name, value in (("shard_count", shard_count), ("prepare.samples_per_shard", samples_per_shard)):
        if value is not None and value < 1:
            raise UserError(f"{name}: must be at least 1, got {value!r}")


def _preprocessing(
    source: Source,
    image_size: int | None,
    channels: int | None,
    levels: int | None,
    png_encoder: PngEncoder,
    workers: Workers | None,
) -> Preprocessing:
    levels = source.levels if levels is None else levels
    try:
        if channels is None:
            # a bad option is reported before the files are looked at
            Preprocessing(image_size, 1, levels)
            channels = 3 if _in_colour(source, workers) else 1
        preprocessing = Preprocessing(image_size, channels, levels, png_encoder)
    except ValueError as error:
        raise UserError(f"prepare.{error}") from None
    check_encoder(png_encoder, channels, "prepare.png_encoder")
    return preprocessing


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


def _write_shards(
    storage: Storage,
    plan: Plan,
    existing: Dataset | None,
    source: Source,
    preprocessing: Preprocessing,
    progress: Progress | None,
    workers: Workers | None,
) -> tuple[list[Shard], tuple[int, int, int]]:
    sizes = {info.key: info.num_bytes for split in SPLITS for info in storage.list(f"{split}/")}
    shape = _shape_of_first(plan, source, preprocessing)
    recipe = Recipe(storage, source.reader, preprocessing, shape, libraries(preprocessing.png_encoder))
    named = (
        {} if existing is None else {shard.key: shard for split in SPLITS for shard in existing.shards(split)}
    )
    there = sum(f"{key.removesuffix('.tar')}.index.parquet" in sizes for key in sizes if key.endswith(".tar"))
    if there and existing is None:
        log.info(
            "%s: shards left by an attempt that did not end: %d; going on from there", storage.uri, there
        )
    total, done = len(source.entries), 0
    shards: dict[int, Shard] = {}
    bad: list[Bad] = []

    def left() -> Iterator[Job]:
        for number, shard in enumerate(plan):
            if len(bad) >= MAX_NAMED:
                return
            num_bytes = sizes.get(shard.key) if shard.index_key in sizes else None
            yield Job(number, shard, num_bytes, look_only=bool(bad), named=named.get(shard.key))

    def tell(samples: int) -> None:
        if progress is not None:
            progress(done + samples, total)

    def here() -> Generator[tuple[Job, Shard | Refused], None, None]:
        for job in left():
            yield job, make_shard(recipe, job, tell)

    made = here() if workers is None else workers(partial(make_shard, recipe), left())
    with contextlib.closing(made):
        for job, shard in made:
            if isinstance(shard, Refused):
                bad += shard.bad
            else:
                shards[job.number] = shard
            done += len(job.plan.entries)
            tell(0)
    if bad:
        raise BadImages.of(bad, total)
    _check_arrived(storage, shards.values())
    return [shards[number] for number in range(len(plan))], shape


def _shape_of_first(plan: Plan, source: Source, preprocessing: Preprocessing) -> tuple[int, int, int]:
    """Which shape all images must have: that of the first good one, also where an earlier attempt wrote it."""
    bad: list[Bad] = []
    for entry in (entry for shard in plan for entry in shard.entries):
        try:
            return convert(source.reader, entry, preprocessing, None).shape
        except BadImage as error:
            bad.append(error.bad)
        if len(bad) == MAX_NAMED:
            break
    raise BadImages.of(bad, len(source.entries))


def _check_arrived(storage: Storage, shards: Iterable[Shard]) -> None:
    """The record must not name what nobody can read: a folder of one machine is not that of another, and another
    process may have cleaned up here.
    """
    sizes = {info.key: info.num_bytes for split in SPLITS for info in storage.list(f"{split}/")}
    for shard in shards:
        if sizes.get(shard.key) != shard.num_bytes or shard.index_key not in sizes:
            raise StorageError(
                f"{storage.uri}/{shard.key}: was written and is not to be seen here: write to S3 or to a folder "
                "that all machines share, or prepare in this process (--local); if another process prepared the "
                "same, prepare again"
            )
