"""Columns of texts, numbers and few values: they give back what was put in, and are small."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import columns
from pipelines.columns import Coded, Joined, Numbered, Passed, Texts, mapped, narrow
from pipelines.entries import Entry
from pipelines.sources import split_suffix
from pipelines.tars import TarError, checked_name
from tests.support.data import entries_of

# names of files may be any bytes
texts = st.lists(st.text(max_size=4) | st.sampled_from(["", "\udcff", "ü", "a\udc80/b", "€"]), max_size=30)


@given(given=texts, cut=st.integers(0, 30))
def test_texts_come_back(given: list[str], cut: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_PIECE", 3)
        column = Texts.of(given)
        assert list(column) == given
        joined = Joined([Texts.of(given[:cut]), Texts.of([]), Texts.of(given[cut:])])
        assert list(joined) == given
    assert [column[row] for row in range(len(column))] == given
    assert [joined[row] for row in range(len(joined))] == given
    order = column.order()
    rows = range(len(given)) if order is None else order.tolist()
    assert [given[row] for row in rows] == sorted(given)
    assert (order is None) == (given == sorted(given))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([], "u1"),
        ([0, 255], "u1"),
        ([256], "u2"),
        ([2**16], "u4"),
        ([2**32 - 1], "u4"),
        ([2**32], "u8"),
        ([2**64 - 1], "u8"),
        ([-1, 127], "i1"),
        ([-1, 128], "i2"),
        ([-1, 2**31 - 1], "i4"),
        ([-1, 2**31], "i8"),
    ],
)
def test_integers_take_as_few_bytes_as_they_can(values: list[int], kind: str) -> None:
    wide = np.array(values, np.uint64 if max(values, default=0) >= 2**63 else np.int64)
    assert narrow(wide).dtype == np.dtype(kind)
    assert narrow(wide).tolist() == values


def test_values_are_held_once_and_by_their_type() -> None:
    rows: list[str | int | None] = ["1", 1, None, "1", -1, None]
    column = Coded.of(rows)
    assert list(column) == rows
    assert column.values == ("1", 1, None, -1)
    assert column.codes.dtype == np.uint8
    assert [column[row] for row in range(6)] == rows


def test_numbers_are_texts_that_are_not_held() -> None:
    column = Numbered("x/", 12, 3)
    assert (len(column), column[7], list(column)[-1]) == (12, "x/007", "x/011")
    assert mapped(column, str) is column
    changed = mapped(column, lambda text: text.replace("11", "eleven"))
    assert list(changed)[-2:] == ["x/010", "x/0eleven"]


def test_what_is_passed_over_is_counted_and_the_first_is_kept() -> None:
    passed = Passed()
    passed.add(0, "")
    for name in ("c", "a", "b"):
        passed.append(name)
    passed.add(0, "")
    passed.add(5, "aa")
    assert passed == Passed(8, "a")


parts = st.lists(
    st.sampled_from(["a", "b.c", ".", "..", ".d", "e.", "", "f.png", "x.y.z", "\n", "."]), max_size=5
)


@settings(max_examples=500)
@given(parts=parts, slash=st.booleans())
def test_a_path_is_split_as_pathlib_does(parts: list[str], slash: bool) -> None:
    path = "/" * slash + "/".join(parts)
    if not PurePosixPath(path).name:
        return
    expected = str(PurePosixPath(path).with_suffix("")), PurePosixPath(path).suffix
    assert split_suffix(path) == expected


@settings(max_examples=500)
@given(parts=parts, slash=st.booleans())
def test_a_members_name_is_checked_as_by_pathlib(parts: list[str], slash: bool) -> None:
    name = "/" * slash + "/".join(parts)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        with pytest.raises(TarError, match=r"points outside of it"):
            checked_name(name)
    else:
        assert checked_name(name) == str(path)


@given(
    count=st.integers(0, 20), parts=st.integers(1, 5), chosen=st.slices(20), rows=st.lists(st.integers(0, 19))
)
def test_entries_are_a_sequence(count: int, parts: int, chosen: slice, rows: Sequence[int]) -> None:
    made = [
        Entry(f"{number}", number - 1, f"name {number}", number, f"{number // 3}") for number in range(count)
    ]
    entries = entries_of(made, parts)
    assert list(entries) == made
    assert entries[chosen] == tuple(made[chosen])
    assert [entries[number] for number in range(-count, count)] == made * 2
    inside = [row for row in rows if row < count]
    assert entries.take(np.array(inside, np.uint8)) == tuple(made[row] for row in inside)
    assert list(entries.keys) == [entry.key for entry in made]
    with pytest.raises(IndexError):
        entries[count]
