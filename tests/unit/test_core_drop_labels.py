"""Labels dropped for classifier-free guidance."""

import math

import torch

from ddpm_core.objectives import drop_labels


def test_dropped_labels_are_keyed_and_as_many_as_asked_for() -> None:
    index = torch.arange(20_000)
    labels = index % 10
    got = drop_labels(labels, 10, 0.1, 3, index)
    dropped = got == 10
    assert torch.equal(got[~dropped], labels[~dropped])
    assert abs(int(dropped.sum()) - 2000) < 5 * math.sqrt(20_000 * 0.1 * 0.9)
    assert torch.equal(drop_labels(labels[70:80], 10, 0.1, 3, index[70:80]), got[70:80])
    assert torch.equal(drop_labels(labels.flip(0), 10, 0.1, 3, index.flip(0)), got.flip(0))
    assert not torch.equal(drop_labels(labels, 10, 0.1, 4, index), got)
    # the more are dropped, the more; none of them comes back
    assert bool((drop_labels(labels, 10, 0.3, 3, index)[dropped] == 10).all())


def test_no_label_or_every_label_is_dropped() -> None:
    index = torch.arange(1000)
    labels = index % 10
    assert torch.equal(drop_labels(labels, 10, 0.0, 0, index), labels)
    assert drop_labels(labels, 10, 1.0, 0, index).unique().tolist() == [10]
    assert drop_labels(labels[:1], 10, 1.0, 0, index[:1]).tolist() == [10]
    assert drop_labels(labels[:0], 10, 0.5, 0, index[:0]).tolist() == []
    assert labels.unique().tolist() == list(range(10))
