"""`ddpm verify`: every kind of damage to a data set is found and named, and a whole one has none."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import cli
from pipelines.dataset import DataError, Dataset, shards_from_parquet, shards_to_parquet
from pipelines.errors import UserError
from pipelines.images import encode_png
from pipelines.prepare import prepare
from pipelines.shard_reader import ShardReader
from pipelines.shards import PackedShard, Sample, pack, parse_index, sha256
from pipelines.stored_order import read_split
from pipelines.verified import Verified
from pipelines.verify_dataset import verify_dataset as verify
from tests.support.data import dataset_of, edit_record, image_bytes, packed, put_dataset, random_images

TAR, INDEX = "train/shard-000001.tar", "train/shard-000001.index.parquet"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    dataset_of(root, [6, 5, 4])
    return root


@pytest.fixture
def prefix(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "set")
    return tmp_path / "set"


def verified(prefix: Path, deep: bool = False) -> Verified:
    return verify(Dataset.load(str(prefix)), deep=deep)


def lines(prefix: Path, deep: bool = False) -> list[str]:
    return [str(problem) for problem in verified(prefix, deep).problems]


def change(path: Path, edit: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def flip(position: int, bit: int = 3) -> Callable[[bytearray], None]:
    def edit(data: bytearray) -> None:
        data[position] ^= 1 << bit

    return edit


def test_whole_data_sets_have_no_problem(prefix: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    found = verify(Dataset.load(str(prefix)), deep=True, progress=lambda *x: told.append(x))
    assert (found.problems, found.looked["shards"], found.looked["samples"]) == ((), 4, 18)
    assert told[-1] == (18, 18)
    assert found.looked["num_bytes"] == sum(path.stat().st_size for path in prefix.glob("*/*.tar"))
    digits = prepare("digits", str(tmp_path / "digits"), shard_count=3)
    assert verify(digits, deep=True).problems == ()


def test_members_and_jpegs_and_hard_keys_are_no_problem(tmp_path: Path) -> None:
    jpeg = image_bytes(Image.fromarray(random_images(1)[0][0]), "JPEG")
    keys = ["größe/猫 1", "x" * 96, "a%2Eb", "d.d/e"]
    shard = pack(
        Sample(key, jpeg, number, {"txt": b"caption", "seg.png": b"x"}) for number, key in enumerate(keys)
    )
    dataset = put_dataset(tmp_path / "a", {"train": [shard]}, (1, 8, 8))
    assert verify(dataset, deep=True).problems == ()
    unlabelled = pack(Sample(key, jpeg) for key in keys)
    assert verify(put_dataset(tmp_path / "b", {"train": [unlabelled]}, (1, 8, 8)), deep=True).problems == ()


@pytest.mark.parametrize("name", [TAR, INDEX])
def test_a_missing_object_is_named(prefix: Path, name: str) -> None:
    (prefix / name).unlink()
    assert lines(prefix) == [f"{prefix.as_uri()}/{name}: is missing"]


@pytest.mark.parametrize("name", [TAR, INDEX])
def test_swapped_objects_are_named_both(prefix: Path, name: str) -> None:
    other = name.replace("000001", "000002")
    one, two = (prefix / name).read_bytes(), (prefix / other).read_bytes()
    (prefix / name).write_bytes(two)
    (prefix / other).write_bytes(one)
    said = lines(prefix)
    for place, owner in ((name, other), (other, name)):
        start = (
            f"{prefix.as_uri()}/{place}: has the bytes of {prefix.as_uri()}/{owner}: the two were exchanged"
        )
        assert any(line.startswith(start) for line in said)
    assert len(said) == 2


def test_wherever_a_tar_is_cut_it_is_named(prefix: Path) -> None:
    whole = (prefix / TAR).read_bytes()
    with tarfile.open(prefix / TAR) as archive:
        members = archive.getmembers()
    cuts = [members[2].offset + 100, members[3].offset_data + 20, members[4].offset, 0, len(whole) - 512]
    for cut in cuts:
        (prefix / TAR).write_bytes(whole[:cut])
        found = lines(prefix)
        assert f"{prefix.as_uri()}/{TAR}: has {cut} bytes, and the data set says {len(whole)}" in found
        assert all(TAR in line for line in found)
    (prefix / TAR).write_bytes(whole[: members[4].offset])
    lost = [line for line in lines(prefix) if "lie beyond the end of the tar" in line]
    assert len(lost) == 1
    assert "sample 'sample-000008': its " in lost[0]
    assert lost[0].endswith(" … and 2 more samples likewise")


def test_a_flipped_bit_is_named_whatever_it_is_of(prefix: Path) -> None:
    whole = (prefix / TAR).read_bytes()
    index = parse_index((prefix / INDEX).read_bytes())
    offset = int(index.offset[2])
    name = f"{prefix.as_uri()}/{TAR}"
    change(prefix / TAR, flip(offset + 40))
    found = lines(prefix)
    assert found[0].startswith(f"{name}: has SHA-256")
    assert found[1:] == [
        f"{name}: sample 'sample-000008': its bytes do not have the CRC32C that the index gives"
    ]
    (prefix / TAR).write_bytes(whole)
    change(prefix / TAR, flip(offset - 512))
    found = lines(prefix)
    assert found[0].startswith(f"{name}: has SHA-256")
    assert f"header at byte {offset - 512} is damaged" in found[1]
    (prefix / TAR).write_bytes(whole)
    change(prefix / TAR, flip(len(whole) - 1))
    assert "has SHA-256" in lines(prefix)[0]
    (prefix / TAR).write_bytes(whole)
    size = (prefix / INDEX).stat().st_size
    for position in (4, size // 3, size // 2, size - 6):
        kept = (prefix / INDEX).read_bytes()
        change(prefix / INDEX, flip(position))
        assert lines(prefix)[0].startswith(f"{prefix.as_uri()}/{INDEX}: has SHA-256")
        (prefix / INDEX).write_bytes(kept)
    assert lines(prefix) == []


def test_the_record_of_another_data_set_is_refused(prefix: Path, tmp_path: Path) -> None:
    dataset_of(tmp_path / "other", [6, 5, 4], seed=1)
    shutil.copy(tmp_path / "other/shards.parquet", prefix)
    with pytest.raises(DataError, match="restore it, or delete both, and the same `ddpm prepare` makes them"):
        verified(prefix)
    shutil.copy(tmp_path / "other/dataset.json", prefix)
    found = lines(prefix)
    for number in range(3):
        assert any(f"shard-{number:06d}.tar: has SHA-256" in line for line in found)


def rewritten(shard: PackedShard, edit: Callable[[dict[str, list[Any]]], None]) -> PackedShard:
    """The shard with another index, whose hashes its data set will name."""
    table = pq.read_table(pa.BufferReader(shard.index))
    columns = table.to_pydict()
    edit(columns)
    file = io.BytesIO()
    pq.write_table(pa.table(columns, schema=table.schema), file)
    return PackedShard(shard.tar, file.getvalue(), len(columns["key"]), shard.tar_sha256)


@pytest.mark.parametrize(
    ("edit", "key", "said"),
    [
        (lambda c: c["key"].__setitem__(1, "other"), "other", "is in the index and not in its tar"),
        (lambda c: c["key"].__setitem__(1, "other"), "sample-000001", "is in the tar and not in its index"),
        (lambda c: c["offset"].__setitem__(1, c["offset"][2]), "sample-000001", "has no member of it"),
        (lambda c: c["length"].__setitem__(1, 9), "sample-000001", "points at 9 bytes"),
        (
            lambda c: c["label"].__setitem__(1, 7),
            "sample-000001",
            "the tar gives it the label '1', the index 7",
        ),
        (lambda c: c["crc32c"].__setitem__(1, 7), "sample-000001", "CRC32C"),
        (
            lambda c: [column.pop() for column in c.values()],
            "sample-000004",
            "is in the tar and not in its index",
        ),
    ],
)
def test_an_index_that_does_not_fit_its_tar_is_named_though_every_hash_is_right(
    tmp_path: Path, edit: Callable[[dict[str, list[Any]]], None], key: str, said: str
) -> None:
    shard = rewritten(packed(random_images(5)), edit)
    dataset = put_dataset(tmp_path, {"train": [shard]}, (1, 8, 8))
    found = [str(problem) for problem in verify(dataset).problems]
    assert any(f"shard-000000.tar: sample {key!r}: " in line and said in line for line in found), found


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"", "no PNG"),
        (b"words", "no PNG"),
        (encode_png(random_images(1, (3, 8, 8))[0]), "shape"),
        (image_bytes(Image.new("I;16", (8, 8))), "bit depth 16"),
        (image_bytes(Image.new("P", (8, 8))), "colour type 3"),
        (image_bytes(Image.new("L", (8, 8)), "JPEG")[:-150], "broken JPEG"),
    ],
)
def test_an_image_that_can_not_be_decoded_is_named_with_deep_alone(
    tmp_path: Path, image: bytes, said: str
) -> None:
    good = encode_png(random_images(1)[0])
    shard = pack([Sample("good", good), Sample("größe/bad", image), Sample("good2", good)])
    dataset = put_dataset(tmp_path, {"train": [shard]}, (1, 8, 8))
    assert verify(dataset).problems == ()
    (problem,) = verify(dataset, deep=True).problems
    assert problem.sample == "größe/bad"
    assert said in problem.reason


def test_labels_without_a_class_are_named(tmp_path: Path) -> None:
    shard = pack([Sample("a", encode_png(random_images(1)[0]), 10)])
    dataset = put_dataset(tmp_path, {"train": [shard]}, (1, 8, 8))
    (problem,) = verify(dataset).problems
    assert problem.reason == "has the label 10, and the data set has 10 classes"


# ---- the command


def ddpm_verify(*arguments: str) -> int:
    # without `cli.main`, which sets up logging and signals for the whole process
    return int(cli.module_of("verify").run(cli.command_parser("verify").parse_args(arguments)))


@pytest.fixture(autouse=True)
def no_stack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DDPM_STATE", str(tmp_path / "no stack"))


def test_the_command_says_whole_and_exits_with_0(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ddpm_verify(str(prefix), "--deep") == 0
    assert ": whole; 4 shards, 18 samples, " in capsys.readouterr().out


def test_the_command_names_each_bad_sample_and_exits_with_1(
    prefix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = parse_index((prefix / INDEX).read_bytes())
    for row in (1, 3):
        change(prefix / TAR, flip(int(index.offset[row]) + 30))
    (prefix / "test/shard-000000.tar").unlink()
    assert ddpm_verify(str(prefix)) == 1
    out = capsys.readouterr().out
    assert "shard-000001.tar: sample 'sample-000007': its bytes do not have the CRC32C" in out
    assert " … and 1 more sample likewise\n" in out
    assert "test/shard-000000.tar: is missing" in out
    assert "3 problems" in out.splitlines()[-2]
    assert out.splitlines()[-1].startswith(
        "what to do: delete the objects named, then the same `ddpm prepare`"
    )
    assert ddpm_verify(str(prefix), "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["whole"], result["samples"], len(result["problems"])) == (False, 18, 3)
    assert [(problem["sample"], problem["likewise"]) for problem in result["problems"]] == [
        (None, []),
        ("sample-000007", ["sample-000009"]),
        (None, []),
    ]
    assert result["advice"] == out.splitlines()[-1].removeprefix("what to do: ")


def test_one_is_one(prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_dataset(tmp_path / "one", {"train": [packed(random_images(1))]}, (1, 8, 8))
    (tmp_path / "one" / "train/shard-000000.tar").unlink()
    assert ddpm_verify(str(tmp_path / "one")) == 1
    assert ": 1 problem; 1 shard, 1 sample, " in capsys.readouterr().out


def test_what_is_wrong_in_each_of_many_samples_is_told_once_a_kind(tmp_path: Path) -> None:
    dataset_of(tmp_path, [45, 45])
    one, two = (tmp_path / f"train/shard-{number:06d}.tar" for number in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    # the samples of the second, and yet no shard of the record
    one.write_bytes(second + bytes(512))
    found = verified(tmp_path).problems
    assert len(found) < 5
    assert {len(problem.likewise) for problem in found if problem.sample is not None} == {44}
    one.write_bytes(first)
    index = tmp_path / "train/shard-000000.index.parquet"
    index.write_bytes(rewritten(packed(random_images(45)), lambda c: c["crc32c"].reverse()).index)
    assert [
        len(problem.likewise) for problem in verified(tmp_path).problems if problem.sample is not None
    ] == [43]


def test_samples_of_a_tar_that_has_its_hash_are_named_each(tmp_path: Path) -> None:
    shard = rewritten(packed(random_images(4)), lambda c: c["crc32c"].reverse())
    found = verify(put_dataset(tmp_path, {"train": [shard]}, (1, 8, 8)))
    assert [(problem.sample, problem.likewise) for problem in found.problems] == [
        (f"sample-{number:06d}", ()) for number in range(4)
    ]
    assert found.advice.startswith("where only samples are bad, train with data.on_bad_sample=skip")


@pytest.mark.parametrize("by", ["key", "record"])
def test_tars_that_prepare_did_not_write_are_to_be_restored(prefix: Path, by: str) -> None:
    shard = Dataset.load(str(prefix)).shards("train")[0]
    if by == "key":
        with_key(prefix, key=f"{prefix.as_uri()}/{shard.key}")
    else:
        edit_record(prefix, lambda record: record.update(preparation={"source": "index-only"}))
    assert verified(prefix).advice == ""
    (prefix / shard.key).unlink()
    restore = "restore each tar that is named from where it came (`ddpm prepare` can't make it again)"
    assert verified(prefix).advice == restore
    (prefix / shard.index_key).unlink()
    again = "the same `ddpm prepare` makes the missing indexes again"
    assert verified(prefix).advice == f"{again}; {restore}"
    (prefix / shard.index_key).write_bytes(b"other")
    again = "delete the indexes named, then the same `ddpm prepare` makes them again"
    assert verified(prefix).advice == f"{again}; {restore}"


def test_what_the_readers_message_advises_mends_the_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "digits"
    dataset = prepare("digits", str(root), shard_count=3)
    change(root / TAR, flip(3000))
    with pytest.raises(DataError, match="is damaged") as error:
        list(read_split(dataset, "train"))
    command = str(error.value).split("`")[1]
    assert command == f"ddpm verify {dataset.uri}"
    assert ddpm_verify(*command.split()[2:]) == 1
    *named, _, advice = capsys.readouterr().out.splitlines()
    assert {line.split(": ")[0] for line in named} == {f"{dataset.uri}/{TAR}"}
    assert advice == "what to do: delete the objects named, then the same `ddpm prepare` makes them again"
    (root / TAR).unlink()
    assert verified(root).advice == "the same `ddpm prepare` makes the missing objects again"
    assert prepare("digits", str(root), shard_count=3).identity == dataset.identity
    assert lines(root, deep=True) == []
    assert len(list(read_split(dataset, "train"))) == dataset.count("train")


def test_where_there_is_no_data_set_that_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no data set, run, sample set or checkpoint here") as error:
        ddpm_verify(str(tmp_path))
    assert error.value.exit_code == 2
    (tmp_path / "preparation.json").write_text("{}")
    with pytest.raises(DataError, match="no finished data set") as error:
        ddpm_verify(str(tmp_path))
    assert error.value.exit_code == 2


def test_a_bit_flipped_anywhere_in_a_data_set_is_found(template: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(template, root)
    generator = np.random.default_rng(0)

    def said() -> str:
        try:
            return "\n".join(lines(root))
        except DataError as error:
            return str(error)

    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for _ in range(2):
            change(path, flip(int(generator.integers(len(whole))), int(generator.integers(8))))
            assert path.name in said()
            path.write_bytes(whole)
    assert said() == ""


def test_a_bit_flipped_anywhere_in_its_record_is_found(template: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(template, root)
    record = root / "dataset.json"
    whole = record.read_bytes()
    for position in range(len(whole)):
        change(record, flip(position, position % 8))
        with pytest.raises(DataError, match=r"dataset\.json: (is|has) "):
            Dataset.load(str(root))
        record.write_bytes(whole)
    assert lines(root) == []


def with_key(prefix: Path, **fields: Any) -> Path:
    """The data set with these values in the first shard's row of its list."""
    shards = shards_from_parquet((prefix / "shards.parquet").read_bytes())
    listing = shards_to_parquet([replace(shards[0], **fields), *shards[1:]])
    (prefix / "shards.parquet").write_bytes(listing)
    edit_record(prefix, lambda record: record.update(shards_sha256=sha256(listing)))
    return prefix


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("http://[x/a.tar", "http://[x: Invalid IPv6 URL"),
        ("s3://[x/a.tar", "s3://[x: Invalid IPv6 URL"),
        ("file:///%00/a.tar", "/\\x00: a folder's name may not contain a zero byte"),
        ("http://host/x?y/a.tar", "http://host/x?y: an address to read from can have no part"),
    ],
)
def test_a_key_that_is_no_address_is_named_by_readers_too(prefix: Path, key: str, reason: str) -> None:
    dataset = Dataset.load(str(with_key(prefix, key=key)))
    expected = f"{prefix.as_uri()}/shards.parquet: {reason}"
    (line,) = lines(prefix)
    assert line.startswith(f"{key}: {expected}")
    for ranged_above in (2**63, 0):
        with pytest.raises(DataError) as caught:
            ShardReader(dataset, "train", ranged_above=ranged_above).read(0, [0])
        assert str(caught.value).startswith(expected)


def test_names_that_turn_the_line_around_are_shown_escaped(prefix: Path) -> None:
    changed = with_key(prefix, key="a\u202eb.tar", index_key="c\u2028d")
    assert all(line.isprintable() for line in lines(changed))
    told = " ".join(lines(changed))
    assert "a\\u202eb.tar: is missing" in told
    assert "c\\u2028d: is missing" in told
    with pytest.raises(DataError) as caught:
        ShardReader(Dataset.load(str(changed)), "train").read(0, [0])
    assert str(caught.value).isprintable()


def test_an_object_that_is_listed_twice_is_named(prefix: Path) -> None:
    told = lines(with_key(prefix, key=TAR, index_key=INDEX))
    assert f"{TAR}: is listed twice in the data set's list of shards" in told
    assert f"{INDEX}: is listed twice in the data set's list of shards" in told


def test_what_is_in_a_data_set_twice_is_named(tmp_path: Path) -> None:
    samples = [Sample(f"k{number}", encode_png(image), 0) for number, image in enumerate(random_images(5))]
    one, other = pack(samples[:2]), pack(samples[2:])
    again = pack([*samples[2:], samples[2]])
    wrong = put_dataset(tmp_path / "wrong", {"train": [one, again], "test": [one]}, (1, 8, 8))
    told = [(problem.sample, problem.reason) for problem in verify(wrong).problems]
    assert ("k2", "is in the index more than once") in told
    assert [reason for _, reason in told if "holds the same bytes as train/shard-000000.tar" in reason]
    whole = put_dataset(tmp_path / "whole", {"train": [one], "test": [other]}, (1, 8, 8))
    assert not verify(whole).problems
