"""The plan of a data set, made of columns, is that of a slow program that holds every sample as an object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import duplicates, prepare_plan
from pipelines.columns import Coded, Texts
from pipelines.duplicates import repeated
from pipelines.entries import Entry, checked
from pipelines.errors import UserError, printable
from pipelines.labels import number_labels
from pipelines.prepare_plan import keyed_hash, plan_shards
from pipelines.prepare_shards import ShardPlan
from tests.support.data import entries_of

Hash = Callable[[int, str, str], int]


def slow_plan(
    entries: Sequence[Entry],
    seed: int,
    test_fraction: float,
    shard_count: int | None,
    samples_per_shard: int | None,
    hashed: Hash,
) -> list[ShardPlan]:
    splits: dict[str, list[Entry]] = {"train": [], "test": []}
    for entry in entries:
        below = hashed(seed, "split", entry.key) < Fraction(test_fraction) * 2**64
        splits["test" if below else "train"].append(entry)
    size = -(-len(splits["train"]) // shard_count) if shard_count else samples_per_shard or 1024
    plans = []
    for split, chosen in splits.items():
        window_of: dict[str, int] = {}
        window = filled = 0
        counts = Counter(entry.group for entry in chosen)
        for group in sorted(counts, key=lambda group: (hashed(seed, "group", group), group)):
            window_of[group] = window
            filled += counts[group]
            if filled >= 8 * size:
                window, filled = window + 1, 0
        chosen.sort(key=lambda e: (window_of[e.group], hashed(seed, "shard", e.key), e.key))
        count = shard_count if shard_count and split == "train" else -(-len(chosen) // max(size, 1))
        for number in range(count):
            piece = chosen[number * len(chosen) // count : (number + 1) * len(chosen) // count]
            stem = f"{split}/shard-{number:06d}"
            plans.append(ShardPlan(split, f"{stem}.tar", f"{stem}.index.parquet", tuple(piece)))
    return plans


def few_values(seed: int, purpose: str, key: str) -> int:
    """As `keyed_hash`, with so few values that many keys share one; the largest and the smallest among them."""
    return [0, 2**63 - 1, 2**63, 2**64 - 1][keyed_hash(seed, purpose, key) % 4]


def of_keys(keys: Sequence[str], run: int, groups: int) -> list[Entry]:
    return [
        Entry(key, number % 7 - 1, f"name {key}", (number,), f"group {number // run % groups}" if run else "")
        for number, key in enumerate(keys)
    ]


@pytest.mark.parametrize("hashed", [keyed_hash, few_values])
@settings(max_examples=150, deadline=None)
@given(
    keys=st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=2, max_size=90, unique=True),
    run=st.integers(0, 9),
    groups=st.integers(1, 12),
    parts=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    test_fraction=st.floats(0.01, 0.99) | st.just(0.5),
    shards=st.one_of(
        st.tuples(st.integers(1, 9), st.none()), st.tuples(st.none(), st.none() | st.integers(1, 9))
    ),
)
def test_the_plan_is_that_of_the_slow_program(
    hashed: Hash,
    keys: list[str],
    run: int,
    groups: int,
    parts: int,
    seed: int,
    test_fraction: float,
    shards: tuple[int | None, int | None],
) -> None:
    entries = of_keys(keys, run, groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_plan, "keyed_hash", hashed)
        patch.setattr(prepare_plan, "_PIECE", 7)
        expected = slow_plan(entries, seed, test_fraction, *shards, hashed)
        samples = {
            split: sum(len(p.entries) for p in expected if p.split == split) for split in ("train", "test")
        }
        source = entries_of(entries, parts)
        if 0 in samples.values() or (shards[0] or 0) > samples["train"]:
            with pytest.raises(UserError, match=r"split empty|are more than the"):
                plan_shards(source, seed, test_fraction, *shards)
            return
        plan = plan_shards(source, seed, test_fraction, *shards)
    assert len(plan) == len(expected)
    assert list(plan) == expected
    assert list(plan.objects()) == [(shard.key, shard.index_key) for shard in expected]
    assert plan[-1] == expected[-1]


@given(
    rows=st.lists(st.sampled_from(["", "a", "b", "ä", "aa", "x\udcff"]) | st.text(max_size=3), max_size=60),
    known=st.integers(1, 9),
)
def test_keys_that_come_back_are_found_also_where_hashes_collide(rows: list[str], known: int) -> None:
    expected: dict[str, list[int]] = {}
    for row, key in enumerate(rows):
        expected.setdefault(key, []).append(row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_hash", lambda key: hash(key) % known - 2)
        found = repeated(Texts.of(rows))
    assert found == {key: where for key, where in expected.items() if len(where) > 1}


def test_of_two_samples_with_one_key_the_first_are_named() -> None:
    keys = ["d", "c", "b", "c", "a", "b", "b"]
    entries = entries_of([Entry(key, -1, f"{number}.png") for number, key in enumerate(keys)], 3)
    with pytest.raises(UserError, match=r"^source: 2\.png and 5\.png would both be the sample 'b': rename"):
        checked("x", entries)
    with pytest.raises(UserError, match=r"^source: x holds no image$"):
        checked("x", entries_of([]))


def slow_numbers(
    labels: Sequence[str | int | None], names: Sequence[str] | None
) -> tuple[tuple[str, ...], list[int]]:
    known = [None if value in (None, -1, "-1") else value for value in labels]
    absent = sum(value is None for value in known)
    if absent == len(known):
        return (), [-1] * len(known)
    if absent:
        raise UserError(
            f"source: x: {absent} of {len(known)} images have no label, such as {known.index(None)}: give all of "
            "them one, or none"
        )
    texts = [str(value) for value in known]
    if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in texts):
        for place, value in enumerate(known):
            if isinstance(value, int) and not 0 <= value < 2**20:
                raise UserError(f"source: x: {place} has the label {value}, which is no class")
        classes = sorted(set(texts))
        return tuple(map(printable, classes)), [classes.index(text) for text in texts]
    values = [int(text) for text in texts]
    spelt: dict[int, int] = {}
    for place, value in enumerate(values):
        if texts[spelt.setdefault(value, place)] != texts[place]:
            raise UserError(
                f"source: x: {spelt[value]} has the label {texts[spelt[value]]}, and {place} {texts[place]}, which "
                f"would both be the class {value}: write it one way"
            )
    largest = max(values)
    if largest >= (2**20 if names is None else len(names)):
        why = f"the source names {len(names)} classes" if names is not None else "is no class's number"
        raise UserError(f"source: x: {values.index(largest)} has the label {largest}: {why}")
    return tuple(map(printable, names or map(str, range(largest + 1)))), values


labels_of_any_kind = st.sampled_from(
    ["0", "1", "7", "007", "07", "2", "12", "-1", "x", "ä\n", "x", 0, 3, -1, -5, 2**20, 10**12, None]
)


@settings(max_examples=400)
@given(
    pool=st.lists(labels_of_any_kind, min_size=1, max_size=4),
    picks=st.lists(st.integers(0, 3), max_size=30),
    cut=st.integers(0, 30),
    names=st.none() | st.just(["a", "b", "c"]),
)
def test_labels_are_numbered_as_by_the_slow_program(
    pool: list[str | int | None], picks: list[int], cut: int, names: list[str] | None
) -> None:
    labels = [pool[pick % len(pool)] for pick in picks]
    columns = [Coded.of(labels[:cut]), Coded.of(labels[cut:])]

    def ours() -> tuple[tuple[str, ...], list[int]]:
        classes, numbers = number_labels("x", columns, names)
        assert numbers.dtype.itemsize <= 4
        return classes, numbers.tolist()

    assert told(ours) == told(lambda: slow_numbers(labels, names))


def told(work: Callable[[], object]) -> object:
    try:
        return work()
    except UserError as error:
        return str(error)
