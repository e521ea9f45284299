"""`ddpm verify` of sample sets: every kind of damage is named, and a whole one has none."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ddpm_core.samplers import SamplerConfig
from pipelines.config_sections import SampleConfig
from pipelines.images import encode_png
from pipelines.sample_recipe import Recipe
from pipelines.sample_set import SampleSet
from pipelines.shards import Sample, pack, parse_index, sha256
from pipelines.storage import open_storage
from pipelines.verify import kind_at, verify
from tests.support.data import random_images
from tests.unit.test_verify import change, ddpm_verify, flip, no_stack  # noqa: F401 (a fixture for all of them)
from tests.unit.test_verify_run import edit_json

RECIPE = Recipe(
    name="tiny",
    checkpoint="file:///nowhere",
    checkpoint_identity="0" * 64,
    sampler=SamplerConfig(),
    settings=SampleConfig(count=10, unit_size=4, batch_size=4),
    shape=(1, 8, 8),
    levels=256,
)
UNIT = "units/unit-000001.json"


def made(root: Path, recipe: Recipe = RECIPE, finish: bool = True) -> Path:
    """Ten images of one channel in units of four."""
    place = root / recipe.set_name()
    found = SampleSet(open_storage(str(place)))
    images = torch.from_numpy(random_images(recipe.settings.count, seed=5))
    for unit, start in enumerate(range(0, recipe.settings.count, 4)):
        found.write_unit(recipe, unit, images[start : min(start + 4, recipe.settings.count)])
    if finish:
        found.finish(recipe)
    return place


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("samples"))


@pytest.fixture
def place(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / template.name)
    return tmp_path / template.name


def lines(address: Path, deep: bool = False) -> list[str]:
    return [
        str(problem).replace(address.as_uri(), "SET") for problem in verify(str(address), deep=deep).problems
    ]


def only(address: Path, deep: bool = False) -> str:
    [line] = lines(address, deep)
    assert "\n" not in line
    return line


def shard(place: Path, unit: int, kind: str = "tar") -> Path:
    [path] = place.glob(f"shard-{unit:06d}-*.{kind}")
    return path


def edit_unit(place: Path, unit: int, /, **changes: Any) -> None:
    """In the unit's own record and in that of the set, so that they agree."""
    edit_json(place / f"units/unit-{unit:06d}.json", **changes)
    record = json.loads((place / "samples.json").read_text())
    record["units"][unit] = json.loads((place / f"units/unit-{unit:06d}.json").read_text())
    (place / "samples.json").write_text(json.dumps(record))


def replace_objects(place: Path, unit: int, tar: bytes, index: bytes) -> None:
    """Other objects in the place of a unit's, of which all records know."""
    for kind, data in (("tar", tar), ("index.parquet", index)):
        shard(place, unit, kind).write_bytes(data)
    edit_unit(
        place, unit,
        shard__num_bytes=len(tar), shard__sha256=sha256(tar),
        index__num_bytes=len(index), index__sha256=sha256(index),
    )  # fmt: skip


def test_a_whole_set_has_no_problem(place: Path) -> None:
    told: list[tuple[int, int]] = []
    found = verify(str(place), deep=True, progress=lambda *x: told.append(x))
    assert (found.problems, found.notes, found.kind) == ((), (), "sample set")
    assert place.name == f"tiny-{found.identity[:10]}"
    assert found.looked == {
        "shards": 3,
        "samples": 10,
        "num_bytes": sum(path.stat().st_size for path in place.glob("shard-*")),
    }
    assert told == [(4, 10), (8, 10), (10, 10)]
    assert kind_at(open_storage(str(place))) == "sample set"


@pytest.mark.parametrize("kind", ["tar", "index.parquet"])
def test_an_object_that_is_missing_cut_or_altered_is_named(place: Path, kind: str) -> None:
    path = shard(place, 1, kind)
    name, whole = f"SET/{path.name}", path.read_bytes()
    path.unlink()
    assert only(place) == f"{name}: is named by its commit record and missing"
    path.write_bytes(whole[:-9])
    assert only(place) == f"{name}: has {len(whole) - 9} bytes, its commit record says {len(whole)}"
    path.write_bytes(whole)
    change(path, flip(len(whole) // 2))
    assert only(place) == f"{name}: its SHA-256 differs from its commit record's"


def test_swapped_shards_are_named_both(place: Path) -> None:
    one, two = shard(place, 0), shard(place, 1)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    found = lines(place)
    assert [line.split(": ")[0] for line in found] == [f"SET/{one.name}", f"SET/{two.name}"]


def test_units_whose_records_are_swapped_are_named(place: Path) -> None:
    """Every hash is right, and every image is under another's number."""
    first, second = (json.loads((place / f"units/unit-00000{unit}.json").read_text()) for unit in (0, 1))
    for unit, other in ((0, second), (1, first)):
        edit_unit(place, unit, shard=other["shard"], index=other["index"])
    found = lines(place)
    assert len(found) == 2
    assert "sample '000000004': stands where image 000000000 belongs" in found[0]


@pytest.mark.parametrize(
    ("path", "changes", "said"),
    [
        ("samples.json", {"format_version": 3}, "has format version 3, this program reads 1"),
        (UNIT, {"format_version": 3}, "has format version 3, this program reads 1"),
        ("samples.json", {"kind": "ddpm-sweep"}, "is a 'ddpm-sweep', not a sample set"),
        ("samples.json", {"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ("samples.json", {"count": 12}, "count: 12, and its recipe says 10"),
        ("samples.json", {"levels": 17}, "levels: 17, and its recipe says 256"),
        ("samples.json", {"shape": [3, 8, 8]}, "shape: [3, 8, 8], and its recipe says [1, 8, 8]"),
        ("samples.json", {"recipe__seed": 1}, "its recipe is that of a set named …-"),
        (UNIT, {"shard__key": "../../x.tar"}, "shard.key: '../../x.tar' is no object key"),
        (UNIT, {"index__key": "/etc/passwd"}, "index.key: '/etc/passwd' is no object key"),
        (UNIT, {"unit": 2}, "is the record of unit 2"),
        (UNIT, {"stop": 9}, "names other objects or images than samples.json"),
    ],
)
def test_a_record_that_says_something_else_is_named(
    place: Path, path: str, changes: dict[str, Any], said: str
) -> None:
    edit_json(place / path, **changes)
    found = lines(place)
    assert any(line.startswith(f"SET/{path}: ") and said in line for line in found), found
    assert all("\n" not in line and len(line) < 400 for line in found)


def test_a_path_that_leads_out_in_the_record_of_the_whole_is_refused(place: Path) -> None:
    record = json.loads((place / "samples.json").read_text())
    record["units"][1]["shard"]["key"] = "../secret"
    (place / "samples.json").write_text(json.dumps(record))
    assert "SET/samples.json: units.1.shard.key: '../secret' is no object key" in only(place)


@pytest.mark.parametrize(
    ("unit", "changes", "said"),
    [
        (1, {"start": 3}, "unit 1 holds images 3 to 7, and 4 is the next"),
        (1, {"stop": 7}, "unit 2 holds images 8 to 9, and 7 is the next"),
        (2, {"stop": 11}, "its units end before image 11, and it has 10 images"),
        (0, {"start": 4}, "unit 0 holds images 4 to 3, and 0 is the next"),
        (2, {"unit": 1}, "lists unit 1 where 2 belongs"),
    ],
)
def test_an_image_in_no_unit_or_in_two_is_named(
    place: Path, unit: int, changes: dict[str, Any], said: str
) -> None:
    edit_unit(place, unit, **changes)
    assert f"SET/samples.json: {said}" in lines(place)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\xff", '{"format_version": 1}'])
@pytest.mark.parametrize("path", ["samples.json", UNIT])
def test_a_record_that_is_cut_or_none_is_one_line(place: Path, path: str, text: str) -> None:
    (place / path).write_bytes(text.encode("latin-1"))
    assert only(place).startswith(f"SET/{path}: ")


def test_a_unit_without_its_record_or_one_too_many_is_named(place: Path) -> None:
    other = json.loads((place / UNIT).read_text())
    (place / UNIT).unlink()
    assert only(place) == f"SET/{UNIT}: is missing, though samples.json names the unit"
    (place / UNIT).write_text(json.dumps(other))
    (place / "units/unit-000007.json").write_text(json.dumps({**other, "unit": 7}))
    assert only(place) == "SET/units/unit-000007.json: is no unit of samples.json"


def test_a_set_that_is_not_finished_is_not_whole_and_its_units_are_checked(tmp_path: Path) -> None:
    place = made(tmp_path, finish=False)
    assert only(place) == "SET/samples.json: is missing: 3 units are there; `ddpm sample` goes on"
    shard(place, 2).unlink()
    found = lines(place)
    assert len(found) == 2
    assert "is named by its commit record and missing" in found[1]


Columns = dict[str, list[Any]]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda c: c["key"].__setitem__(1, "0009\n"),
            r"sample '0009\\n': stands where image 000000005 belongs",
        ),
        (
            lambda c: c["label"].__setitem__(1, 3),
            "sample '000000005': has the label 3, and its recipe says -1",
        ),
        (lambda c: c["crc32c"].__setitem__(1, 3), "sample '000000005': its bytes do not have the CRC32C"),
        (lambda c: c["length"].__setitem__(1, 3), "sample '000000005': the index points at 3 bytes"),
        (lambda c: [column.pop() for column in c.values()], "says 3 samples, and its unit's record says 4"),
    ],
)
def test_an_index_that_does_not_fit_is_named_though_every_hash_is_right(
    place: Path, edit: Callable[[Columns], None], said: str
) -> None:
    table = pq.read_table(pa.BufferReader(shard(place, 1, "index.parquet").read_bytes()))
    columns = table.to_pydict()
    edit(columns)
    file = io.BytesIO()
    pq.write_table(pa.table(columns, schema=table.schema), file)
    replace_objects(place, 1, shard(place, 1).read_bytes(), file.getvalue())
    assert any(said in line for line in lines(place)), lines(place)


def test_an_index_without_its_tars_hash_is_named(place: Path) -> None:
    table = pq.read_table(pa.BufferReader(shard(place, 1, "index.parquet").read_bytes()))
    bare = {key: value for key, value in table.schema.metadata.items() if b"tar" not in key}
    file = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(bare), file)
    replace_objects(place, 1, shard(place, 1).read_bytes(), file.getvalue())
    assert "does not say of which tar" in only(place)


@pytest.mark.parametrize("image", [b"words", encode_png(random_images(1, (3, 8, 8))[0])])
def test_an_image_that_can_not_be_decoded_is_named_with_deep_alone(place: Path, image: bytes) -> None:
    good = [encode_png(one) for one in random_images(4)]
    packed = pack(Sample(f"{4 + row:09d}", image if row == 2 else good[row]) for row in range(4))
    replace_objects(place, 1, packed.tar, packed.index)
    assert lines(place) == []
    assert only(place, deep=True).startswith(f"SET/{shard(place, 1).name}: sample '000000006': ")


def test_the_classes_are_those_of_the_recipe(tmp_path: Path) -> None:
    # the last label of five asks for no class, and is written as none
    settings = RECIPE.settings.model_copy(update={"labels": (2, 0, 4)})
    place = made(tmp_path, replace(RECIPE, settings=settings, num_classes=4))
    index = parse_index(shard(place, 0, "index.parquet").read_bytes())
    assert index.label.tolist() == [2, 0, -1, 2]
    assert lines(place, deep=True) == []
    edit_json(place / "samples.json", recipe__labels=[2, 1, 4])
    found = [line for line in lines(place) if "has the label" in line]
    assert len(found) == 3
    assert "sample '000000001': has the label 0, and its recipe says 1" in found[0]
    # what is no list of labels is no reason to fall over
    edit_json(place / "samples.json", recipe__labels={"a": 1})
    assert any("its recipe is that of a set named" in line for line in lines(place))


def test_what_killed_attempts_left_is_a_note(place: Path) -> None:
    (place / "shard-000001-0123.tar").write_bytes(b"12345")
    found = verify(str(place))
    assert found.problems == ()
    [note] = found.notes
    assert note.startswith("1 objects (5 bytes) that no unit names")


def test_a_bit_flipped_anywhere_in_a_set_is_found(template: Path, tmp_path: Path) -> None:
    place = tmp_path / template.name
    shutil.copytree(template, place)
    generator = np.random.default_rng(0)
    for path in sorted(place.glob("shard-*")):
        whole = path.read_bytes()
        change(path, flip(int(generator.integers(len(whole))), int(generator.integers(8))))
        assert path.name in only(place)
        path.write_bytes(whole)
    assert lines(place) == []


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ddpm_verify(str(place), "--deep") == 0
    assert re.search(
        rf"sample set {place.name}: whole; 3 shards, 10 samples, \d+ bytes", capsys.readouterr().out
    )
    shard(place, 0).unlink()
    shard(place, 2, "index.parquet").unlink()
    assert ddpm_verify(str(place)) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert f"sample set {place.name}: 2 problems; " in out[-1]
    assert ddpm_verify(str(place), "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["whole"], len(told["problems"]), told["samples"]) == (
        "sample set",
        False,
        2,
        10,
    )


def test_a_set_of_classes_that_is_not_finished_has_no_other_problem(tmp_path: Path) -> None:
    place = made(tmp_path, replace(RECIPE, num_classes=3), finish=False)
    assert "samples.json: is missing" in only(place, deep=True)
    [note] = verify(str(place)).notes
    assert note.startswith("whether the images have the labels that were asked for is not known")


@pytest.mark.parametrize("image", [b"words", encode_png(random_images(1, (3, 8, 8))[0])])
def test_the_images_of_a_set_that_is_not_finished_are_checked_too(tmp_path: Path, image: bytes) -> None:
    place = made(tmp_path, finish=False)
    good = [encode_png(one) for one in random_images(4)]
    packed = pack(Sample(f"{4 + row:09d}", image if row == 2 else good[row]) for row in range(4))

    def put(tar: bytes, index: bytes) -> None:
        for kind, data in (("tar", tar), ("index.parquet", index)):
            shard(place, 1, kind).write_bytes(data)
        edit_json(
            place / UNIT,
            shard__num_bytes=len(tar), shard__sha256=sha256(tar),
            index__num_bytes=len(index), index__sha256=sha256(index),
        )  # fmt: skip

    put(packed.tar, packed.index)
    assert "samples.json: is missing" in only(place)
    assert f"{shard(place, 1).name}: sample '000000006': " in lines(place, deep=True)[1]
    table = pq.read_table(pa.BufferReader(packed.index))
    columns = table.to_pydict()
    columns["crc32c"][1] = 3
    file = io.BytesIO()
    pq.write_table(pa.table(columns, schema=table.schema), file)
    put(packed.tar, file.getvalue())
    assert "sample '000000005': its bytes do not have the CRC32C" in lines(place)[1]


@pytest.mark.parametrize("finish", [True, False])
def test_a_unit_that_is_made_again_meanwhile_is_no_damage(tmp_path: Path, finish: bool) -> None:
    place = made(tmp_path, finish=finish)
    before = lines(place)
    old = shard(place, 2)
    old.write_bytes(b"damaged")

    def make_again(done: int, total: int) -> None:
        if done == 4:
            images = torch.from_numpy(random_images(10, seed=5))
            SampleSet(open_storage(str(place))).write_unit(RECIPE, 2, images[8:])

    assert len(lines(place)) == len(before) + 1
    found = verify(str(place), progress=make_again)
    assert not old.exists()
    assert [str(problem).replace(place.as_uri(), "SET") for problem in found.problems] == before
    assert any(note.startswith("unit 2: was made again") for note in found.notes)
    # what its own record names stays damage, also where the record of the whole names something else
    shard(place, 2).write_bytes(b"damaged")
    assert len(lines(place)) > len(before)
    assert not any("made again" in note for note in verify(str(place)).notes)


def test_a_copy_may_end_with_a_date(place: Path) -> None:
    copy = place.parent / "backup-2026010203"
    shutil.copytree(place, copy)
    assert lines(copy) == []
    other = place.parent / "tiny-012345678a"
    place.rename(other)
    assert "its recipe is that of a set named" in only(other)


def test_a_set_that_is_made_whole_before_its_record_is_read_is_no_damage(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(place, 2).write_bytes(b"damaged")
    record = SampleSet.record

    def mend(found: SampleSet) -> Any:
        monkeypatch.setattr(SampleSet, "record", record)
        found.write_unit(RECIPE, 2, torch.from_numpy(random_images(10, seed=5))[8:])
        found.finish(RECIPE)
        return found.record()

    monkeypatch.setattr(SampleSet, "record", mend)
    assert lines(place) == []
