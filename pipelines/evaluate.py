"""How good a set of samples and its model are, beside what real images and noise get on the same scale.

Distances are taken in the features of a small classifier trained on the data set's own training images, so
they are not FID and compare only within one data set.  Every distance is between equally many images, since
its bias depends on their number.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_core import rng
from ddpm_core.bound import BoundEstimate
from pipelines.bad_samples import BadSamples
from pipelines.checkpoints import Checkpoint
from pipelines.config import Config
from pipelines.dataset import Dataset
from pipelines.distances import frechet_distance, kernel_distance
from pipelines.errors import UserError
from pipelines.evaluation_record import FORMAT_VERSION
from pipelines.features import Classifier, train_classifier
from pipelines.held_out import held_out_bound, model_chain, sampler_chain
from pipelines.images import to_uint8
from pipelines.sample_recipe import checkpoint_config
from pipelines.sample_set import SampleSet
from pipelines.sampling import load_model
from pipelines.stored_order import read_rows
from pipelines.world import SingleWorker

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

_MOST_IMAGES = 10_000
"""Images a side in a distance; beyond, its error is far below what differs between models."""


@dataclass(frozen=True)
class Distance:
    """Distances of a set of images to held-out ones, `count` on each side."""

    name: str
    count: int
    frechet: float
    kernel: float
    confidence: float
    """The classifier's mean probability for the class that it decides for."""


@dataclass(frozen=True)
class Evaluation:
    """What `report.json` says."""

    checkpoint: str
    step: int
    samples: str
    num_samples: int
    classifier: str
    classifier_identity: str
    classifier_accuracy: float
    """On held-out images."""
    distances: list[Distance]
    """Of samples, of real training images, and of noise, in this order."""
    class_shares: dict[str, float]
    """Share of each class in the whole sample set, as the classifier decides."""
    bound: BoundEstimate
    """Of the model's own chain, whichever sampler made the images."""
    bound_of: str
    """Which chain that is."""
    sampler_bound: BoundEstimate | None
    """Of the chain that the images were drawn from, if it has one."""
    sampler_bound_of: str
    """Which chain that is, or why it has none."""
    warnings: list[str] = field(default_factory=list)
    """What makes the distances say little, a line each."""

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["bound"] = _plain(self.bound)
        values["sampler_bound"] = None if self.sampler_bound is None else _plain(self.sampler_bound)
        return {"format_version": FORMAT_VERSION, **values}


def _plain(bound: BoundEstimate) -> dict[str, Any]:
    # a t that was never drawn has no value, nor has the spread of one image; JSON calls that null
    values = {name: None if np.isscalar(v) and np.isnan(v) else v for name, v in asdict(bound).items()}
    return {**values, "per_t": [None if np.isnan(term) else term for term in bound.per_t]}


def evaluate(config: Config, dataset: Dataset, checkpoint: Checkpoint, samples: SampleSet) -> Evaluation:
    """Judge a finished sample set and the model that made it.

    Raises `UserError` where the data set has no labels to train a classifier on.
    """
    if len(dataset.classes) < 2:
        raise UserError(
            f"{dataset.uri}: has no classes, and the distances need a classifier; "
            "prepare it from a folder with a sub-folder a class"
        )
    bad = BadSamples(config.data.on_bad_sample == "skip")
    train_images, train_labels = _load(dataset, "train", bad)
    test_images, test_labels = _load(dataset, "test", bad)
    record = samples.record()
    if tuple(record.shape) != dataset.shape:
        raise UserError(f"{samples.uri}: images of shape {record.shape}, the data set's have {dataset.shape}")
    log.info("training the classifier on %d images", len(train_images))
    classifier = train_classifier(
        train_images, train_labels, seed=config.seed, num_classes=len(dataset.classes)
    )
    sides = (len(train_images), len(test_images), record.count)
    count = min(*sides, _MOST_IMAGES)
    if count < 2:
        raise UserError(f"{samples.uri}: distances need at least 2 images a side, and here there is {count}")
    accuracy = classifier.accuracy(test_images, test_labels)
    reference = classifier.features(test_images[:count])
    made, shares = _samples(samples, classifier, count)
    noise = to_uint8(
        rng.normal(config.seed, "evaluate noise", torch.arange(count), dataset.shape), dataset.levels
    ).numpy()
    log.info("distances of %d images a side", count)
    distances = [
        _distance(name, images, reference, classifier)
        for name, images in (("samples", made), ("real", train_images[:count]), ("noise", noise))
    ]
    log.info("bound on %d held-out images", len(test_images))
    bounds = _bounds(config, dataset, checkpoint)
    return Evaluation(
        checkpoint=checkpoint.uri,
        step=checkpoint.step,
        samples=samples.uri,
        num_samples=record.count,
        classifier=classifier.name,
        classifier_identity=classifier.identity,
        classifier_accuracy=accuracy,
        distances=distances,
        class_shares={name: float(share) for name, share in zip(dataset.classes, shares, strict=True)},
        warnings=too_few(*sides, classifier.num_features) + too_weak(accuracy, test_labels),
        **bounds,
    )


def too_few(train: int, test: int, samples: int, num_features: int) -> list[str]:
    """The warning of distances between so few images that the fitted Gaussians have no full rank, or nothing.

    The covariance of n feature vectors of d numbers has rank n − 1 at most, and d needs n > d.
    """
    asked = {
        "samples": (samples, "sample.count"),
        "held-out images": (test, "prepare.test_fraction"),
        "training images": (train, "the number of images prepared"),
    }
    short = {name: found for name, found in asked.items() if found[0] <= num_features}
    if not short:
        return []
    there = ", ".join(f"{count} {name} (raise {setting})" for name, (count, setting) in short.items())
    return [
        f"the distances mean little: there are {there}, and {num_features} features need at least "
        f"{num_features + 1} images a side, below which the covariances in Fréchet have no full rank"
    ]


def too_weak(accuracy: float, labels: NDArray[np.int64]) -> list[str]:
    """The warning of a classifier that is nearer to naming the most frequent class each time than to be right."""
    guessing = float(np.bincount(labels).max() / len(labels))
    if accuracy >= (1 + guessing) / 2:
        return []
    return [
        f"the distances say little: their classifier is right on {accuracy:.1%} of the held-out images, and naming "
        f"the most frequent class each time on {guessing:.1%}; it saw too few images, or the classes look alike"
    ]


def _bounds(config: Config, dataset: Dataset, checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of an `Evaluation` that say bits/dim: of the model's chain and of the sampler's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = load_model(checkpoint, device)
    asked = {name: getattr(config, name) for name in ("bound", "sampler", "sample", "data")}
    trained = checkpoint_config(checkpoint).model_copy(update=asked)
    own = model_chain(trained)
    bound = held_out_bound(dataset, trained, model, SingleWorker(device), None, own)
    sampled: BoundEstimate | None = None
    try:
        chain = sampler_chain(trained)
    except ValueError as error:
        of = f"sampler.{error}"
    else:
        of = chain.told()
        # equal words are equal chains: they name all that a configuration can choose
        same = of == own.told()
        sampled = (
            bound if same else held_out_bound(dataset, trained, model, SingleWorker(device), None, chain)
        )
    return {"bound": bound, "bound_of": own.told(), "sampler_bound": sampled, "sampler_bound_of": of}


def _load(dataset: Dataset, split: str, bad: BadSamples) -> tuple[Pixels, NDArray[np.int64]]:
    """The labelled images of a split."""
    found = read_rows(dataset, split, on_bad=bad.add)
    rows = [(row.image, row.label) for row in found if row.label >= 0]
    if not rows:
        raise UserError(f"{dataset.uri}: its {split} split has no labelled image")
    return np.stack([image for image, _ in rows]), np.array([label for _, label in rows], dtype=np.int64)


def _samples(
    samples: SampleSet, classifier: Classifier, count: int, block: int = 2048
) -> tuple[Pixels, NDArray[np.float64]]:
    """The first `count` images, and the share of each class in the whole set, which streams by."""
    first: list[Pixels] = []
    tally = np.zeros(classifier.num_classes)
    for images in _blocks(samples, block):
        if (missing := count - sum(map(len, first))) > 0:
            first.append(images[:missing])
        decided = classifier.probabilities(images).argmax(1)
        tally += np.bincount(decided, minlength=classifier.num_classes)
    return np.concatenate(first), tally / tally.sum()


def _blocks(samples: SampleSet, block: int) -> Iterator[Pixels]:
    held: list[Pixels] = []
    for _, image in samples.images():
        held.append(image)
        if len(held) == block:
            yield np.stack(held)
            held = []
    if held:
        yield np.stack(held)


def _distance(name: str, images: Pixels, reference: Any, classifier: Classifier) -> Distance:
    features = classifier.features(images)
    assert len(features) == len(reference)
    return Distance(
        name=name,
        count=len(images),
        frechet=frechet_distance(features, reference),
        kernel=kernel_distance(features, reference),
        confidence=float(classifier.probabilities(images).max(1).mean()),
    )
