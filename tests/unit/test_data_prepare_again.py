"""A second call: on a source that has changed in place, and on an index-only set that is not whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import index_only
from pipelines.dataset import DataError, Dataset
from pipelines.duplicates import same_content, twice
from pipelines.errors import UserError
from pipelines.images import encode_png
from pipelines.index_only import index_tars
from pipelines.index_scan import Scanned, Scans, scan_tar
from pipelines.prepare import prepare
from pipelines.shards import INDEX_ENCODINGS
from pipelines.storage import FileStorage, StorageError
from pipelines.stored_order import read_split
from pipelines.verify_dataset import verify_dataset
from tests.support.data import image_bytes, random_images, write_image
from tests.unit.test_data_source_tar import tar_of
from tests.unit.test_data_workers import Elsewhere, files

IMAGES = random_images(32)


class Killed(BaseException):
    pass


def put_photos(root: Path, seed: int = 0) -> Path:
    for number, pixels in enumerate(random_images(20, seed=seed)):
        write_image(root / f"{number}.bmp", pixels[0])
    return root


def put_tars(root: Path, count: int = 8) -> Path:
    root.mkdir(parents=True)
    for tar in range(count):
        members = {}
        for n in range(4):
            members[f"{tar}-{n}.png"] = encode_png(IMAGES[4 * tar + n])
            members[f"{tar}-{n}.cls"] = f"class {n % 3}".encode()
        (root / f"a-{tar}.tar").write_bytes(tar_of(members))
    return root


def refusal(make: Callable[..., Dataset], source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        make(str(source), str(out), **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    return str(error.value)


# ---- a source that changes in place


def test_images_that_were_replaced_in_place_are_not_taken_for_the_old_ones(tmp_path: Path) -> None:
    photos = put_photos(tmp_path / "in")
    prepare(str(photos), str(tmp_path / "out"))
    before = files(tmp_path / "out")
    put_photos(photos, seed=1)
    line = refusal(prepare, photos, tmp_path / "out")
    assert "may hold other images" in line
    assert "delete preparation.json there" in line
    assert files(tmp_path / "out") == before


def test_old_and_new_images_do_not_mix_in_a_set_that_is_gone_on_with(tmp_path: Path) -> None:
    photos, out = put_photos(tmp_path / "in"), tmp_path / "out"

    def kill(done: int, _: int) -> None:
        if done >= 12:
            raise Killed

    with pytest.raises(Killed):
        prepare(str(photos), str(out), samples_per_shard=4, progress=kill)
    changed = photos / "7.bmp"
    write_image(changed, 255 - IMAGES[7][0])
    assert "may hold other images" in refusal(prepare, photos, out, samples_per_shard=4)
    assert "delete all that lies there" in refusal(prepare, photos, out, samples_per_shard=4)
    shutil.rmtree(out)
    dataset = prepare(str(photos), str(out), samples_per_shard=4)
    stored = {key: pixels for split in dataset.splits for key, pixels, _ in read_split(dataset, split)}
    assert np.array_equal(stored["7"][0], 255 - IMAGES[7][0])


def test_a_copy_with_other_times_is_the_same_data_set_elsewhere(tmp_path: Path) -> None:
    photos = put_photos(tmp_path / "in")
    one = prepare(str(photos), str(tmp_path / "one"))
    copy = tmp_path / "copy/in"
    shutil.copytree(photos, copy)
    for path in copy.iterdir():
        os.utime(path, ns=(1, 1))
    two = prepare(str(copy), str(tmp_path / "two"))
    assert one.identity == two.identity
    assert "source_state" not in one.record["preparation"]
    # what the message says to do where the content is the same
    assert "may hold other images" in refusal(prepare, copy, tmp_path / "one")
    (tmp_path / "one/preparation.json").unlink()
    assert prepare(str(copy), str(tmp_path / "one")) == one
    (tmp_path / "one/train/shard-000000.tar").unlink()
    assert prepare(str(copy), str(tmp_path / "one")) == one
    assert verify_dataset(one).problems == ()


def test_a_claim_of_before_there_were_states_is_gone_on_with(tmp_path: Path) -> None:
    photos, out = put_photos(tmp_path / "in"), tmp_path / "out"
    one = prepare(str(photos), str(out))
    claim = json.loads((out / "preparation.json").read_bytes())
    del claim["source_state"]
    (out / "preparation.json").write_text(json.dumps(claim))
    assert prepare(str(photos), str(out)) == one
    (out / "dataset.json").unlink()
    assert prepare(str(photos), str(out)) == one


def test_what_differs_is_told_shortly(tmp_path: Path) -> None:
    tars = put_tars(tmp_path / "in")
    index_tars(str(tars), str(tmp_path / "out"))
    line = refusal(prepare, tars, tmp_path / "out", samples_per_shard=7, image_size=4)
    assert (
        "prepare.channels (nothing there, 1 asked for), crop (nothing there, centre square asked for), "
        in line
    )
    assert "more; prepare it the same way" in line
    assert "fingerprint" not in line


# ---- --index-only


def count_scans(monkeypatch: pytest.MonkeyPatch, kill_at: int | None = None) -> list[str]:
    scanned: list[str] = []

    def scan(storage: Any, task: tuple[str, int], **options: Any) -> Any:
        scanned.append(task[0])
        if len(scanned) == kill_at:
            raise Killed
        return scan_tar(storage, task, **options)

    monkeypatch.setattr(index_only, "scan_tar", scan)
    return scanned


@pytest.mark.parametrize("at_once", [None, 2])
def test_after_a_kill_only_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int | None
) -> None:
    tars, out = put_tars(tmp_path / "in"), tmp_path / "out"
    whole = index_tars(str(tars), str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        count_scans(patch, kill_at=7)
        with pytest.raises(Killed):
            index_tars(str(tars), str(out))
    assert not (out / "preparation.json").exists()
    # one of those that were read is written anew, with the same size
    changed = tars / "a-2.tar"
    data = changed.read_bytes()
    os.utime(changed, ns=(1, 1))
    told: list[tuple[int, int]] = []
    scanned = count_scans(monkeypatch)
    workers = None if at_once is None else Elsewhere(at_once)
    if workers is None:
        dataset = index_tars(str(tars), str(out), progress=lambda *x: told.append(x))
        assert scanned == ["a-2.tar", "a-6.tar", "a-7.tar"]
    else:  # the counter is on the other side of the border
        dataset = index_tars(str(tars), str(out), progress=lambda *x: told.append(x), workers=workers)
    assert told == [(5, 8), (6, 8), (7, 8), (8, 8)]
    assert dataset == whole
    assert changed.read_bytes() == data
    assert sorted(files(out)) == sorted(files(tmp_path / "whole"))
    assert not (out / "scans").exists()


def test_a_scan_is_of_the_members_that_were_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = put_tars(tmp_path / "in")
    with monkeypatch.context() as patch:
        count_scans(patch, kill_at=7)
        with pytest.raises(Killed):
            index_tars(str(tars), str(tmp_path / "out"))
    (next((tmp_path / "out/scans").iterdir())).write_bytes(b"words")
    scanned = count_scans(monkeypatch)
    index_tars(str(tars), str(tmp_path / "out"), image="png")
    assert len(scanned) == 8


def plain(scanned: Scanned) -> dict[str, Any]:
    columns = {name: column.tolist() for name, column in scanned.columns.items()}
    return {**vars(scanned), **columns, "columns": None} | {
        name: list(vars(scanned)[name]) for name in ("keys", "labels")
    }


def test_a_scan_comes_back_as_it_was(tmp_path: Path) -> None:
    members = {
        "README": b"x",
        "1.png": encode_png(IMAGES[0]),
        "1.cls": b"owl",
        "2.png": encode_png(IMAGES[1]),
    }
    for name, data in (("a.tar", tar_of(members)), ("b.tar", tar_of({"README": b"x"}))):
        (tmp_path / name).write_bytes(data)
        scanned = scan_tar(FileStorage(tmp_path), (name, len(data)), image=None, label=None)
        scans = Scans(FileStorage(tmp_path / "out"), None, None)
        scans.put(scanned, "v1")
        kept = scans.get(name, len(data), "v1")
        assert kept is not None
        assert plain(kept) == plain(scanned)
        assert scans.get(name, len(data), "v2") is None
        assert scans.get(name, len(data) + 1, "v1") is None
        scans.put(scanned, "")
        assert scans.get(name, len(data), "") is None, "nothing tells whether it changed"


def test_a_mistake_leaves_no_claim_and_its_advice_can_be_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for tar in range(3):
        members = {}
        for n in range(4):
            members[f"{n}.png"] = encode_png(IMAGES[4 * tar + n])
            members[f"{n}.jpg"] = image_bytes_of(tar, n)
        (tmp_path / f"in/{tar}.tar").write_bytes(tar_of(members))
    assert "say which with --image EXTENSION" in refusal(index_tars, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert index_tars(str(tmp_path / "in"), str(tmp_path / "out"), image="png").count("train") == 8


def image_bytes_of(tar: int, n: int) -> bytes:
    from PIL import Image

    return image_bytes(Image.fromarray(IMAGES[4 * tar + n][0]), "JPEG")


def test_what_is_in_the_way_is_named_before_a_tar_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = put_tars(tmp_path / "in")
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/theirs").write_text("x")
    scanned = count_scans(monkeypatch)
    assert "is in the way" in refusal(index_tars, tars, tmp_path / "out")
    assert scanned == []


def test_when_a_tar_cannot_be_reached_what_was_read_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = put_tars(tmp_path / "in")

    def scan(storage: Any, task: tuple[str, int], **options: Any) -> Any:
        if task[0] == "a-6.tar":
            raise StorageError("no answer")
        return scan_tar(storage, task, **options)

    with monkeypatch.context() as patch:
        patch.setattr(index_only, "scan_tar", scan)
        assert refusal(index_tars, tars, tmp_path / "out") == "no answer"
    scanned = count_scans(monkeypatch)
    index_tars(str(tars), str(tmp_path / "out"))
    assert scanned == ["a-6.tar", "a-7.tar"]


def test_a_tar_and_its_copy_are_refused(tmp_path: Path) -> None:
    tars = put_tars(tmp_path / "in")
    shutil.copy(tars / "a-0.tar", tars / "z.tar")
    line = refusal(index_tars, tars, tmp_path / "out")
    assert "a-0.tar and z.tar are one tar twice (equal SHA-256)" in line
    assert not (tmp_path / "out").exists()


def test_a_sample_on_both_sides_is_refused(tmp_path: Path) -> None:
    """A tar that holds another's samples and one more has another hash."""
    tars = tmp_path / "in"
    tars.mkdir()
    members = {f"s{number}.png": encode_png(image) for number, image in enumerate(random_images(6))}
    (tars / "a.tar").write_bytes(tar_of({name: members[name] for name in list(members)[:5]}))
    (tars / "b.tar").write_bytes(tar_of(members))
    line = refusal(index_tars, tars, tmp_path / "out")
    assert re.search(r"the sample 's\d' is the same in (a|b)\.tar and in (a|b)\.tar, which is held out", line)
    # the same key of another image is another sample
    (tars / "b.tar").write_bytes(
        tar_of({f"s{n}.png": encode_png(x) for n, x in enumerate(random_images(5, seed=1))})
    )
    assert index_tars(str(tars), str(tmp_path / "out")).count("train") == 5


def test_what_a_kill_after_the_commit_left_goes_with_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars, out = put_tars(tmp_path / "in"), tmp_path / "out"

    with monkeypatch.context() as patch:
        patch.setattr(FileStorage, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            index_tars(str(tars), str(out))
    assert (out / "scans").exists()
    index_tars(str(tars), str(out))
    assert not (out / "scans").exists()


@pytest.mark.parametrize("option", ["image", "label"])
def test_an_option_that_is_no_text_costs_a_line(tmp_path: Path, option: str) -> None:
    line = refusal(index_tars, put_tars(tmp_path / "in"), tmp_path / "out", **{option: "\udcff"})
    assert line.startswith(f"--{option} ")


def test_channels_that_the_tars_do_not_have_are_refused(tmp_path: Path) -> None:
    tars = put_tars(tmp_path / "in")
    assert "are of shape [1, " in refusal(index_tars, tars, tmp_path / "out", channels=3)
    assert index_tars(str(tars), str(tmp_path / "out"), channels=1).shape[0] == 1


def test_a_damaged_claim_beside_a_finished_set_is_passed_over(tmp_path: Path) -> None:
    photos, out = put_photos(tmp_path / "in"), tmp_path / "out"
    dataset = prepare(str(photos), str(out))
    (out / "preparation.json").write_text("[" * 100_000)
    assert prepare(str(photos), str(out)) == dataset


def test_parquet_that_was_replaced_in_place_is_noticed(tmp_path: Path) -> None:
    cells = [{"bytes": encode_png(image), "path": None} for image in random_images(30)]
    pq.write_table(pa.table({"image": cells, "label": [0] * 30}), tmp_path / "a.parquet")
    prepare(str(tmp_path / "a.parquet"), str(tmp_path / "out"))
    size = (tmp_path / "a.parquet").stat().st_size
    os.utime(tmp_path / "a.parquet", ns=(5 * 10**9, 5 * 10**9))
    assert (tmp_path / "a.parquet").stat().st_size == size
    assert "may hold other images" in refusal(prepare, tmp_path / "a.parquet", tmp_path / "out")


def test_indexes_beside_their_tars_are_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars = put_tars(tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr(index_only, "_assign", killed)
        with pytest.raises(KeyboardInterrupt):
            index_tars(str(tars), str(tars))
    assert list(tars.glob("scans/*.parquet"))
    dataset = index_tars(str(tars), str(tars))
    assert index_tars(str(tars), str(tars)) == dataset
    # nor are they in the way of another set
    assert prepare(str(tars), str(tmp_path / "other")).count("train") > 0


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_of_tars_that_stay_damage_is_not_to_be_deleted(tmp_path: Path) -> None:
    tars, out = put_tars(tmp_path / "in"), tmp_path / "out"
    dataset = index_tars(str(tars), str(out))
    shard = dataset.shards("train")[0]
    tar = tars / shard.key.rpartition("/")[2]
    tar.write_bytes(tar.read_bytes().replace(b"IDAT", b"IDAX"))
    with pytest.raises(DataError, match=r"names all that is damaged, and what to do$") as told:
        list(read_split(dataset, "train"))
    command = str(told.value).split("`")[1]
    assert command == f"ddpm verify {dataset.uri}"
    advice = verify_dataset(dataset).advice
    assert advice.startswith("restore each tar that is named")
    assert "delete" not in advice


@pytest.mark.parametrize("make", [index_tars, prepare])
def test_a_label_that_no_sample_has_is_refused(tmp_path: Path, make: Callable[..., Dataset]) -> None:
    line = refusal(make, put_tars(tmp_path / "in"), tmp_path / "out", label="cls2")
    assert re.search(r"its sample '0-0' has no member \.cls2, only png, cls", line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [index_tars, prepare])
def test_a_place_that_is_read_only_is_refused_at_once(tmp_path: Path, make: Callable[..., Dataset]) -> None:
    with pytest.raises(UserError, match=r"^out: https://example\.invalid/x: is read only: write to s3://"):
        make(str(put_tars(tmp_path / "in")), "https://example.invalid/x")


def test_a_damaged_record_says_what_to_do(tmp_path: Path) -> None:
    photos, out = put_photos(tmp_path / "in"), tmp_path / "out"
    dataset = prepare(str(photos), str(out))
    (out / "dataset.json").write_bytes((out / "dataset.json").read_bytes()[:100])
    with pytest.raises(DataError, match="delete it, and the same `ddpm prepare` makes it again"):
        Dataset.load(str(out))
    (out / "dataset.json").unlink()
    assert prepare(str(photos), str(out)) == dataset


def test_a_finished_set_gets_back_a_lost_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars, out = put_tars(tmp_path / "in"), tmp_path / "out"
    dataset = index_tars(str(tars), str(out))
    before = files(out)
    lost = dataset.shards("train")[2]
    (out / lost.index_key).unlink()
    (out / dataset.shards("test")[0].index_key).unlink()
    scanned = count_scans(monkeypatch)
    assert index_tars(str(tars), str(out)) == dataset
    assert len(scanned) == 2
    assert files(out) == before
    assert verify_dataset(dataset).problems == ()
    # where the tar is not what it was, nothing wrong is written
    (out / lost.index_key).unlink()
    path = tars / lost.key.rpartition("/")[2]
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(data.replace(b"class 1", b"class 2", 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "is lost, and can't be made again as it was" in refusal(index_tars, tars, out)
    assert not (out / lost.index_key).exists()


def test_also_one_with_an_earlier_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars, out = put_tars(tmp_path / "in"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(index_only, "INDEX_ENCODINGS", INDEX_ENCODINGS[1:])
        dataset = index_tars(str(tars), str(out))
    before = files(out)
    (out / dataset.shards("train")[2].index_key).unlink()
    assert index_tars(str(tars), str(out)) == dataset
    assert files(out) == before


def test_tars_that_were_moved_or_written_anew_are_noticed(tmp_path: Path) -> None:
    tars, out = put_tars(tmp_path / "in"), tmp_path / "out"
    index_tars(str(tars), str(out))
    shutil.move(tars, tmp_path / "moved")
    line = refusal(index_tars, tmp_path / "moved", out)
    assert "lie elsewhere: choose another --out" in line
    assert "/in/a-" in line
    os.utime(tmp_path / "moved/a-3.tar", ns=(1, 1))
    assert "may hold other images" in refusal(index_tars, tmp_path / "moved", out)


def test_a_tar_that_grows_while_it_is_read_is_named(tmp_path: Path) -> None:
    tars = put_tars(tmp_path / "in")
    size = (tars / "a-0.tar").stat().st_size
    for wrong in (size - 512, size + 512):
        with pytest.raises(
            UserError, match=rf"a-0.tar: had {wrong} bytes when it was listed, and now has {size}"
        ):
            scan_tar(FileStorage(tars), ("a-0.tar", wrong), image=None, label=None)


def test_tars_whose_names_are_no_text_cost_a_line(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff")
    put_tars(tmp_path / "in", 2)
    try:
        shutil.copytree(tmp_path / "in", tmp_path / f"in{odd}")
    except OSError:
        pytest.skip("this file system takes no such name")
    (tmp_path / "in/a-0.tar").rename(tmp_path / f"in/{odd}.tar")
    for source in ("in", f"in{odd}"):
        line = refusal(index_tars, tmp_path / source, tmp_path / "out")
        assert r"\xff" in line
        assert "its name is no UTF-8 text: rename it, or prepare without --index-only" in line


def test_a_png_that_is_cut_short_is_named_with_its_tar(tmp_path: Path) -> None:
    tars = put_tars(tmp_path / "in", 3)
    whole = encode_png(IMAGES[0])
    (tars / "a-1.tar").write_bytes(tar_of({"7.png": whole, "8.png": whole[:-30]}))
    with pytest.raises(UserError, match=r"a-1.tar/8: it cannot be decoded .*: prepare without --index-only"):
        index_tars(str(tars), str(tmp_path / "out"))


# ---- duplicates


def test_what_is_there_twice_is_found() -> None:
    assert twice("abcabda") == ["a", "b"]
    assert twice(["x", "y"]) == []
    assert list(same_content([("1", "p"), ("2", "q"), ("3", "p"), ("4", "p")])) == [("1", "3"), ("1", "4")]
    assert list(same_content([("1", "p"), ("2", "q")])) == []
