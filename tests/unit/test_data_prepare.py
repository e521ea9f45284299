"""Preparing: the format that any WebDataset reader reads, its index and record, and how it goes on after a kill."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipelines import prepare as module
from pipelines import prepare_commit, prepare_shards
from pipelines.dataset import Dataset
from pipelines.decode import decode
from pipelines.errors import UserError
from pipelines.libraries import libraries
from pipelines.prepare import _lies_in, prepare
from pipelines.prepare_commit import claim
from pipelines.prepare_plan import plan_shards
from pipelines.prepare_ray import PreparingStopped
from pipelines.shards import INDEX_ENCODINGS, Encoding, PackedShard, Sample, pack, parse_index, sha256
from pipelines.sources import Entry, open_source
from pipelines.storage import FileStorage, Storage, StorageError, open_storage
from pipelines.verify_dataset import verify_dataset
from tests.support.data import WatchedStorage, entries_of, image_bytes, packed, random_images, write_image


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    prepare("digits", str(out), shard_count=6, seed=3)
    return out


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty 8x8 images of two classes."""
    root = tmp_path / "photos"
    for number, pixels in enumerate(random_images(40)):
        write_image(root / ("cat" if number % 2 else "dog") / f"{number:02d}.png", pixels[0])
    return root


def files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def watch(monkeypatch: pytest.MonkeyPatch, **hooks: Any) -> list[WatchedStorage]:
    """Every storage that `prepare` opens from now on, watched."""
    opened: list[WatchedStorage] = []

    def opener(uri: str) -> Storage:
        opened.append(WatchedStorage(open_storage(uri), **hooks))
        return opened[-1]

    monkeypatch.setattr(module, "open_storage", opener)
    return opened


def refusal(source: str, out: str, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        prepare(source, out, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- the format


def test_webdataset_itself_reads_the_shards_whole(digits: Path) -> None:
    source = open_source("digits")
    expected = {entry.key: entry for entry in source.entries}
    seen: Counter[str] = Counter()
    for tar in sorted(digits.glob("*/*.tar")):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
            entry = expected[sample["__key__"]]
            seen[entry.key] += 1
            assert sample["cls"] == str(entry.label).encode()
            assert sample["png"] == source.read(entry)
    assert seen == Counter(dict.fromkeys(expected, 1))


def test_the_index_points_at_every_image_in_its_tar(digits: Path) -> None:
    for tar in sorted(digits.glob("*/*.tar")):
        data = tar.read_bytes()
        index = parse_index(tar.with_suffix(".index.parquet").read_bytes())
        with tarfile.open(tar) as members:
            images = [member for member in members if member.name.endswith(".png")]
        assert index.key.to_pylist() == [member.name.removesuffix(".png") for member in images]
        assert index.offset.tolist() == [member.offset_data for member in images]
        assert index.length.tolist() == [member.size for member in images]
        bodies = [data[member.offset_data : member.offset_data + member.size] for member in images]
        assert index.crc32c.tolist() == [google_crc32c.value(body) for body in bodies]
        assert (index.tar_num_bytes, index.tar_sha256) == (len(data), sha256(data))


def test_the_record_says_what_the_data_set_is(digits: Path) -> None:
    record = json.loads((digits / "dataset.json").read_text())
    dataset = Dataset.load(str(digits))
    assert (record["format"], record["version"]) == ("ddpm-dataset", 1)
    assert (dataset.shape, dataset.levels, dataset.classes) == ((1, 8, 8), 17, tuple("0123456789"))
    assert dataset.count("train") + dataset.count("test") == 1797
    assert record["splits"]["train"] == {"count": dataset.count("train"), "shards": 6}
    assert 0.07 < dataset.count("test") / 1797 < 0.13
    assert record["shards_sha256"] == sha256((digits / "shards.parquet").read_bytes())
    assert pq.read_table(digits / "shards.parquet").num_rows == 6 + len(dataset.splits["test"])
    for split, shards in dataset.splits.items():
        for shard in shards:
            assert shard.split == split
            assert shard.sha256 == sha256((digits / shard.key).read_bytes())
            assert shard.index_sha256 == sha256((digits / shard.index_key).read_bytes())
            assert shard.num_bytes == (digits / shard.key).stat().st_size


def test_every_shard_holds_every_class_in_about_its_share(digits: Path) -> None:
    dataset = Dataset.load(str(digits))
    for shard in dataset.splits["train"]:
        labels = Counter(parse_index((digits / shard.index_key).read_bytes()).label.tolist())
        assert set(labels) == set(range(10))
        assert max(labels.values()) < 0.2 * shard.count
    counts = [shard.count for shard in dataset.splits["train"]]
    assert max(counts) - min(counts) <= 1


def test_the_same_source_and_options_give_the_same_bytes_anywhere(photos: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options: dict[str, Any] = {"samples_per_shard": 7, "test_fraction": 0.25}
    first, second = (prepare(str(photos), str(out), **options) for out in (one, two))
    assert files(one) == files(two)
    assert first.identity == second.identity
    assert first == second
    assert prepare(str(photos), str(tmp_path / "three"), seed=1, **options).identity != first.identity


def test_a_sample_stays_in_its_split_when_others_come() -> None:
    entries = [Entry(f"key-{number}", -1, "") for number in range(300)]

    def held_out(some: list[Entry]) -> set[str]:
        return {
            e.key
            for plan in plan_shards(entries_of(some), 0, 0.2)
            if plan.split == "test"
            for e in plan.entries
        }

    few = held_out(entries[:150])
    assert few == held_out(entries) & {entry.key for entry in entries[:150]}
    assert held_out(entries) != {
        e.key
        for plan in plan_shards(entries_of(entries), 1, 0.2)
        if plan.split == "test"
        for e in plan.entries
    }


@pytest.mark.parametrize("options", [{"shard_count": 7}, {"samples_per_shard": 13}, {"shard_count": 1}, {}])
def test_the_plan_places_every_sample_once(options: dict[str, int]) -> None:
    entries = [Entry(f"key-{number}", -1, "") for number in range(300)]
    plans = plan_shards(entries_of(entries), 0, 0.1, **options)
    placed = Counter(entry.key for plan in plans for entry in plan.entries)
    assert placed == Counter(entry.key for entry in entries)
    assert len({plan.key for plan in plans}) == len(plans)
    assert all(plan.entries for plan in plans)
    train = [plan for plan in plans if plan.split == "train"]
    assert len(train) == options.get("shard_count", len(train))
    assert all(len(plan.entries) <= options.get("samples_per_shard", 1024) for plan in plans)


def test_a_folder_becomes_colour_squares_of_the_size_asked_for(tmp_path: Path) -> None:
    pixels = random_images(12, (3, 20, 30)).transpose(0, 2, 3, 1)
    for number, image in enumerate(pixels):
        write_image(tmp_path / "in" / f"größe {number}.jpg", image)
    write_image(tmp_path / "in" / "grey.png", random_images(1, (1, 16, 16))[0][0])
    dataset = prepare(str(tmp_path / "in"), str(tmp_path / "out"), image_size=16, test_fraction=0.3)
    assert (dataset.shape, dataset.levels, dataset.classes) == ((3, 16, 16), 256, ())
    assert dataset.record["preparation"]["filter"] == "lanczos"
    assert dataset.count("train") + dataset.count("test") == 13
    grey = prepare(str(tmp_path / "in"), str(tmp_path / "grey"), image_size=8, channels=1, test_fraction=0.3)
    assert grey.shape == (1, 8, 8)


def test_progress_counts_every_sample_up_to_the_total(photos: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    prepare(str(photos), str(tmp_path / "out"), progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (40, 40)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# ---- a second call


def test_a_second_call_finds_the_work_done(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = prepare(str(photos), str(out), samples_per_shard=9)
    before = files(out)
    opened = watch(monkeypatch)
    assert prepare(str(photos), str(out), samples_per_shard=9) == first
    assert [storage.puts for storage in opened] == [[]]
    assert files(out) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "seed (0 there, 1 asked for)"),
        ({"test_fraction": 0.5}, "prepare.test_fraction (0.1 there, 0.5 asked for)"),
        ({"image_size": 4}, "prepare.image_size (nothing there, 4 asked for)"),
        ({"channels": 3}, "prepare.channels (1 there, 3 asked for)"),
        ({"levels": 17}, "prepare.levels (256 there, 17 asked for)"),
        ({"samples_per_shard": 5}, "prepare.samples_per_shard (1024 there, 5 asked for)"),
        ({"source": "digits"}, "source (folder there, digits asked for)"),
    ],
)
@pytest.mark.parametrize("killed", [False, True])
def test_a_second_call_with_other_options_names_them_and_changes_nothing(
    photos: Path, tmp_path: Path, options: dict[str, Any], named: str, killed: bool
) -> None:
    out = tmp_path / "out"
    prepare(str(photos), str(out))
    if killed:
        (out / "dataset.json").unlink()
    before = files(out)
    line = refusal(**{"source": str(photos), "out": str(out)} | options)
    assert named in line
    assert killed == ("was begun otherwise: " in line)
    assert killed == line.endswith("or, if nobody works on it, delete all that lies there")
    assert files(out) == before


def test_a_second_call_with_another_image_in_the_source_is_refused(photos: Path, tmp_path: Path) -> None:
    prepare(str(photos), str(tmp_path / "out"))
    write_image(photos / "dog" / "new.png", random_images(1)[0][0])
    said = refusal(str(photos), str(tmp_path / "out"))
    assert "prepared otherwise: what SOURCE holds, by its fingerprint (" in said


@pytest.mark.parametrize("puts", [1, 2, 3, 6, 11, 12])
def test_killed_after_any_put_it_is_completed_without_redoing_finished_shards(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    puts: int,
) -> None:
    caplog.set_level(logging.INFO, "pipelines.prepare")
    options: dict[str, Any] = {"shard_count": 4, "test_fraction": 0.2}
    prepare(str(photos), str(tmp_path / "undisturbed"), **options)
    left = puts

    def kill(key: str) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        opened = watch(patch, on_put=kill)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(photos), str(out), **options)
    with pytest.raises(UserError, match="no finished data set"):
        Dataset.load(str(out))
    finished = {key.removesuffix(".index.parquet") for key in opened[0].puts if key.endswith("x.parquet")}
    opened = watch(monkeypatch)
    assert caplog.messages == []
    prepare(str(photos), str(out), **options)
    told = [
        f"{out.as_uri()}: shards left by an attempt that did not end: {len(finished)}; going on from there"
    ]
    assert caplog.messages == (told if finished else [])
    assert not {key for key in opened[0].puts if key.split(".")[0] in finished}
    assert files(out) == files(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("key", "cut"),
    [
        ("train/shard-000001.tar", True),
        ("train/shard-000001.tar", False),
        ("train/shard-000001.index.parquet", False),
        ("test/shard-000000.tar", False),
        ("shards.parquet", False),
    ],
)
def test_a_finished_data_set_that_lost_something_gets_it_back(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, cut: bool
) -> None:
    out = tmp_path / "out"
    prepare(str(photos), str(out), shard_count=3)
    whole = files(out)
    if cut:
        (out / key).write_bytes((out / key).read_bytes()[:-512])
    else:
        (out / key).unlink()
    opened = watch(monkeypatch)
    prepare(str(photos), str(out), shard_count=3)
    assert files(out) == whole
    shards = {name.split(".")[0] for name in opened[0].puts if "shard-" in name}
    assert shards == ({key.split(".")[0]} if "shard-" in key else set())
    opened = watch(monkeypatch)
    prepare(str(photos), str(out), shard_count=3)
    assert opened[0].puts == [], "a whole set is left alone"


@pytest.mark.parametrize("damage", ["cut tar", "broken index", "index of another shard"])
def test_a_shard_that_an_earlier_attempt_left_wrong_is_made_again(
    photos: Path, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    prepare(str(photos), str(out), shard_count=3)
    whole = files(out)
    (out / "dataset.json").unlink()
    tar, index = out / "train/shard-000001.tar", out / "train/shard-000001.index.parquet"
    if damage == "cut tar":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif damage == "broken index":
        index.write_bytes(b"not Parquet")
    else:
        index.write_bytes((out / "train/shard-000000.index.parquet").read_bytes())
    prepare(str(photos), str(out), shard_count=3)
    assert files(out) == whole


def test_of_two_at_once_one_commits_and_both_return_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    raced = False

    def race(key: str) -> None:
        nonlocal raced
        if key == "dataset.json" and not raced:
            raced = True
            prepare(str(photos), str(out))

    opened = watch(monkeypatch, on_put=race)
    late = prepare(str(photos), str(out))
    assert raced
    assert sum(storage.puts.count("dataset.json") for storage in opened) == 1
    assert late == Dataset.load(str(out))


# ---- mistakes


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_text("these are words"), "not an image"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be decoded"),
        (lambda path: write_image(path, np.zeros((9, 8), np.uint8)), "8×9 pixels"),
    ],
)
def test_one_bad_image_is_named_and_nothing_is_left(
    photos: Path, tmp_path: Path, spoil: Any, reason: str
) -> None:
    # the last image of the last shard, so that all others are written before it is met
    last = plan_shards(open_source(str(photos)).entries, 0, 0.2, shard_count=4)[-1].entries[-1]
    bad = photos / f"{last.key}.png"
    spoil(bad)
    out = tmp_path / "out"
    line = refusal(str(photos), str(out), shard_count=4, test_fraction=0.2, channels=1)
    assert str(bad) in line
    assert reason in line
    assert not out.exists()
    spoil(bad)
    assert str(bad) in refusal(str(photos), str(out), shard_count=4, test_fraction=0.2, channels=1)


def test_when_the_storage_fails_what_is_written_stays_for_the_next_call(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(key: str) -> None:
        if key == "test/shard-000000.tar":
            raise StorageError(f"{key}: no space left")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        watch(patch, on_put=full)
        assert "no space left" in refusal(str(photos), str(out), shard_count=2)
    assert (out / "train/shard-000001.index.parquet").exists()
    opened = watch(monkeypatch)
    assert prepare(str(photos), str(out), shard_count=2).count("train") > 0
    assert not [key for key in opened[0].puts if key.startswith("train/")]


def test_workers_that_stop_leave_what_is_written_to_the_next_call(photos: Path, tmp_path: Path) -> None:
    """ "The same command goes on from here" is what they say."""
    out = tmp_path / "out"

    def stopping(work: Any, tasks: Any) -> Any:
        for number, task in enumerate(tasks):
            if number == 2:
                raise PreparingStopped("preparing stopped: a worker died; the same command goes on from here")
            yield task, work(task)

    with pytest.raises(PreparingStopped):
        prepare(str(photos), str(out), shard_count=4, channels=3, workers=stopping)
    assert len([key for key in files(out) if key.endswith(".index.parquet")]) == 2
    prepare(str(photos), str(out), shard_count=4, channels=3)
    prepare(str(photos), str(tmp_path / "undisturbed"), shard_count=4, channels=3)
    assert files(out) == files(tmp_path / "undisturbed")


def test_a_source_that_fails_for_a_while_costs_nothing_that_is_written(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, read, reads = tmp_path / "out", FileStorage.get, 0

    def failing(storage: FileStorage, key: str) -> bytes:
        nonlocal reads
        reads += key.endswith(".png")
        if reads > 30:
            raise StorageError("s3://bucket: does not answer")
        return read(storage, key)

    with monkeypatch.context() as patch:
        patch.setattr(FileStorage, "get", failing)
        # its own type, so that Ray tries it again
        with pytest.raises(StorageError, match=r"\.png: s3://bucket: does not answer"):
            prepare(str(photos), str(out), shard_count=4, channels=3)
    assert (out / "train/shard-000000.index.parquet").exists()
    assert prepare(str(photos), str(out), shard_count=4, channels=3).count("train") > 0


def test_what_another_process_took_away_is_not_committed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def take(key: str) -> None:
        if key == "test/shard-000000.index.parquet":
            (out / "train/shard-000000.tar").unlink()

    with monkeypatch.context() as patch:
        watch(patch, on_put=take)
        assert "train/shard-000000.tar: was written and is not to be seen" in refusal(str(photos), str(out))
    assert not (out / "dataset.json").exists()
    assert prepare(str(photos), str(out)).count("train") > 0


def test_what_can_not_be_made_again_byte_for_byte_is_refused_and_the_rest_stays(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose zlib compresses otherwise."""
    out = tmp_path / "out"
    prepare(str(photos), str(out), shard_count=3, image_size=6)
    (out / "train/shard-000001.tar").unlink()
    left = files(out)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_shards, "pack", packed_padded)
        line = refusal(str(photos), str(out), shard_count=3, image_size=6)
        assert "train/shard-000001.tar: can't be made again here" in line
    assert files(out) == left
    prepare(str(photos), str(out), shard_count=3, image_size=6)
    assert not verify_dataset(Dataset.load(str(out))).problems


def test_a_repair_takes_no_other_shard_that_is_whole_for_the_one_named(photos: Path, tmp_path: Path) -> None:
    """As an attempt with another zlib might have left: tar and index agree, and are not what the record names."""
    out, other = tmp_path / "out", tmp_path / "other"
    prepare(str(photos), str(out), shard_count=3)
    whole = files(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_shards, "pack", packed_padded)
        prepare(str(photos), str(other), shard_count=3)
    for name in ("train/shard-000001.tar", "train/shard-000001.index.parquet"):
        (out / name).write_bytes((other / name).read_bytes())
    (out / "train/shard-000002.tar").unlink()
    prepare(str(photos), str(out), shard_count=3)
    assert files(out) == whole


def packed_padded(samples: Iterable[Sample], encoding: Encoding) -> PackedShard:
    return pack((sample._replace(image=sample.image + b"\0") for sample in samples), encoding)


@pytest.mark.parametrize("lost", ["tar", "index.parquet"])
def test_a_set_with_an_earlier_encoding_of_indexes_is_mended_with_that(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_shards, "INDEX_ENCODINGS", INDEX_ENCODINGS[1:])
        prepare(str(photos), str(out), shard_count=3)
    whole = files(out)
    (out / f"train/shard-000001.{lost}").unlink()
    prepare(str(photos), str(out), shard_count=3)
    assert files(out) == whole
    prepare(str(photos), str(tmp_path / "new"), shard_count=3)
    index = "train/shard-000001.index.parquet"
    assert (tmp_path / "new" / index).read_bytes() != (out / index).read_bytes()


def test_an_encoding_of_indexes_is_among_what_decides_the_bytes() -> None:
    assert f", index encoding {len(INDEX_ENCODINGS)}" in libraries()


def test_a_list_of_shards_that_the_record_does_not_name_is_not_put(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prepare(str(photos), str(out), shard_count=3)
    (out / "shards.parquet").unlink()
    left = files(out)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_commit, "shards_to_parquet", lambda shards: b"by another pyarrow")
        assert "shards.parquet: can't be made again here" in refusal(str(photos), str(out), shard_count=3)
    assert files(out) == left


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"test_fraction": 0.0}, "prepare.test_fraction: must lie between 0 and 1, got 0.0"),
        ({"test_fraction": 1.0}, "prepare.test_fraction: must lie between 0 and 1"),
        ({"test_fraction": 1e-9}, "of 40 images leaves the test split empty"),
        ({"test_fraction": 1 - 1e-9}, "of 40 images leaves the train split empty"),
        ({"shard_count": 0}, "shard_count: must be at least 1, got 0"),
        ({"samples_per_shard": 0}, "prepare.samples_per_shard: must be at least 1, got 0"),
        ({"shard_count": 1, "samples_per_shard": 1}, "shard_count, samples_per_shard: give one"),
        ({"shard_count": 41}, "shard_count: 41 shards are more than"),
        ({"image_size": 0}, "prepare.image_size: must be at least 1, got 0"),
        ({"channels": 2}, "prepare.channels: must be 1"),
        ({"levels": 1}, "prepare.levels: must be 2..256, got 1"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_written(
    photos: Path, tmp_path: Path, options: dict[str, Any], line: str
) -> None:
    assert line in refusal(str(photos), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_objects_of_somebody_else_are_not_overwritten(photos: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "out/train/shard-000000.tar"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"precious")
    assert "is in the way" in refusal(str(photos), str(tmp_path / "out"))
    assert files(tmp_path / "out") == {"train/shard-000000.tar": b"precious"}


def test_digits_at_another_size_stay_on_their_levels(tmp_path: Path) -> None:
    dataset = prepare("digits", str(tmp_path), image_size=4, test_fraction=0.01)
    assert (dataset.shape, dataset.levels) == ((1, 4, 4), 17)
    with tarfile.open(tmp_path / "test/shard-000000.tar") as tar:
        member = next(member for member in tar if member.name.endswith(".png"))
        body = tar.extractfile(member)
        assert body is not None
        pixels = np.asarray(Image.open(io.BytesIO(body.read())))
    assert set(pixels.ravel().tolist()) <= {round(level * 255 / 16) for level in range(17)}


def test_a_png_that_fits_is_stored_byte_for_byte(tmp_path: Path) -> None:
    for number, pixels in enumerate(random_images(8)):
        path = tmp_path / "in" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_bytes(Image.fromarray(pixels[0]), "PNG", compress_level=0))
    prepare(str(tmp_path / "in"), str(tmp_path / "out"), test_fraction=0.4)
    for tar_path in (tmp_path / "out").glob("*/*.tar"):
        for sample in webdataset.WebDataset(str(tar_path), shardshuffle=False):
            assert sample["png"] == (tmp_path / "in" / f"{sample['__key__']}.png").read_bytes()
            assert "cls" not in sample


def test_an_encoder_is_part_of_what_a_data_set_is_and_the_usual_one_is_not_named(tmp_path: Path) -> None:
    array = tmp_path / "colours.npy"
    images = random_images(40, (3, 10, 12))
    np.save(array, images.transpose(0, 2, 3, 1))
    usual = prepare(str(array), str(tmp_path / "usual"), test_fraction=0.3)
    by_fpng = prepare(str(array), str(tmp_path / "fpng"), test_fraction=0.3, png_encoder="fpng")
    assert "png_encoder" not in usual.record["preparation"]
    assert by_fpng.record["preparation"]["png_encoder"] == "fpng"
    for out, marked in (("usual", False), ("fpng", True)):
        seen = 0
        for tar in (tmp_path / out).glob("*/*.tar"):
            for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
                assert (b"fdEC" in sample["png"]) == marked
                number = int(sample["__key__"].removeprefix("image-"))
                assert np.array_equal(decode(sample["png"], (3, 10, 12)), images[number])
                seen += 1
        assert seen == 40
    assert usual.identity != by_fpng.identity
    line = refusal(str(array), str(tmp_path / "usual"), test_fraction=0.3, png_encoder="fpng")
    assert "prepare.png_encoder (nothing there, fpng asked for)" in line


def test_an_encoder_that_writes_no_grey_is_refused_before_anything_is_written(
    photos: Path, tmp_path: Path
) -> None:
    line = refusal(str(photos), str(tmp_path / "out"), png_encoder="fpng")
    assert line.startswith("prepare.png_encoder: must be pillow for grey images, got fpng")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "7", "[1]"], ids=range(4))
def test_a_damaged_claim_is_named(tmp_path: Path, text: str) -> None:
    storage = open_storage(str(tmp_path))
    storage.put("preparation.json", text.encode())
    with pytest.raises(
        UserError,
        match=r"/preparation\.json: is damaged: delete all that lies there, if nobody works on it, or",
    ):
        claim(storage, {"seed": 1})


def test_two_installations_do_not_write_over_each_other(photos: Path, tmp_path: Path, monkeypatch) -> None:
    out = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.prepare.commit", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(photos), out)
    before = {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.prepare.libraries", lambda encoder: "Pillow 1.0, zlib 1.0")
        line = refusal(str(photos), out)
        assert "was begun with Pillow " in line
        assert "and here are Pillow 1.0, zlib 1.0, which may make other bytes" in line
    assert before == {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    made = prepare(str(photos), out)
    assert "libraries" not in made.record["preparation"]
    # of a whole set nothing is written any more
    monkeypatch.setattr("pipelines.prepare.libraries", lambda encoder: "Pillow 1.0, zlib 1.0")
    assert prepare(str(photos), out) == made


def test_a_worker_with_other_libraries_is_refused(photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipelines.prepare_shards.libraries", lambda encoder: "Pillow 1.0")
    line = refusal(str(photos), str(tmp_path / "out"))
    assert "a worker has Pillow 1.0, and the one who prepares Pillow " in line


def test_a_worker_without_fpng_is_refused(photos: Path, tmp_path: Path, monkeypatch) -> None:
    def absent(name: str) -> str:
        if name == "fpng":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("pipelines.libraries.version", absent)
    libraries.cache_clear()
    try:
        assert libraries("fpng").endswith(", no fpng")
        assert "fpng" not in libraries("pillow")
    finally:
        libraries.cache_clear()


def test_nothing_is_prepared_to_where_it_would_be_found_as_a_source(photos: Path, tmp_path: Path) -> None:
    tars = tmp_path / "in"
    tars.mkdir()
    (tars / "a.tar").write_bytes(packed(random_images(9)).tar)
    for source, out in (
        (tars, tars / "deeper/out"),
        (tars.as_uri(), tars / "out"),
        (tars, (tars / "out").as_uri()),
        (tars, tars / "../in/out"),
    ):
        line = refusal(str(source), str(out))
        assert line == f"out: {out} lies in the source, which would then be another one: choose another --out"
    assert [path.name for path in tars.iterdir()] == ["a.tar"]
    # beside it, and beside images, which it holds none of
    prepare(str(tars), str(tmp_path / "in-out"), test_fraction=0.3)
    first = prepare(str(photos), f"{photos}/out")
    assert prepare(str(photos), f"{photos}/out") == first


@pytest.mark.parametrize(
    ("source", "out", "inside"),
    [
        ("s3://b/in", "s3://b/in/out", True),
        ("s3://b/in/", "S3://b/in", True),
        ("s3://b/in", "s3://b/in-out", False),
        ("s3://b/in", "/b/in", False),
        ("/b/in", "S3://b/in/out", False),
    ],
)
def test_what_lies_in_a_source(source: str, out: str, inside: bool) -> None:
    assert _lies_in(source, open_storage(out)) == inside


def test_an_empty_source_is_not_the_working_directory(tmp_path: Path) -> None:
    assert refusal("", str(tmp_path / "out")).startswith("source: is empty: give a folder of images")


def test_a_folder_is_not_prepared_into_itself(photos: Path) -> None:
    before = sorted(photos.rglob("*"))
    assert "is the source itself: choose another --out" in refusal(str(photos), f"{photos}/../{photos.name}")
    assert sorted(photos.rglob("*")) == before


def killed(*given: object) -> None:
    raise KeyboardInterrupt
