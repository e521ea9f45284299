"""The small classifier: accurate, repeatable, and blind to what else is in the batch."""

from collections.abc import Iterator

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits

from pipelines.distances import frechet_distance, kernel_distance
from pipelines.features import NUM_FEATURES, Classifier, train_classifier


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    data = load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)[:, None]
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[360:], order[:360]
    return images[train], data.target[train], images[test], data.target[test]


@pytest.fixture(scope="module")
def classifier(digits) -> Classifier:
    return train_classifier(digits[0], digits[1], seed=0, num_classes=10)


def quick(seed: int = 0, shape: tuple[int, int, int] = (1, 8, 8)) -> Classifier:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, size=(12, *shape), dtype=np.uint8)
    return train_classifier(images, np.arange(12) % 3, seed=seed, num_classes=3, num_steps=3, batch_size=8)


def test_training_takes_one_thread_and_leaves_their_number_as_it_was(monkeypatch):
    """What comes out must not depend on the cores at hand, nor the time on what else is busy on them."""
    numbers = []
    step = torch.optim.AdamW.step

    def watched(self, *arguments):
        numbers.append(torch.get_num_threads())
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    torch.set_num_threads(2)
    try:
        quick()
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="labels"):
            train_classifier(np.zeros((2, 1, 8, 8), np.uint8), [0, 0], seed=0, num_classes=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert numbers == [1, 1, 1]


def test_tells_held_out_digits_apart(classifier, digits):
    assert classifier.accuracy(digits[2], digits[3]) >= 0.97


def test_probabilities_are_probabilities_and_agree_with_the_accuracy(classifier, digits):
    _, _, images, labels = digits
    probabilities = classifier.probabilities(images)
    assert probabilities.shape == (len(images), 10)
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-12)
    assert classifier.accuracy(images, labels) == (probabilities.argmax(axis=1) == labels).mean()


def test_features_are_centred_with_unit_average_variance_on_the_training_images(classifier, digits):
    features = classifier.features(digits[0])
    assert features.shape == (len(digits[0]), NUM_FEATURES)
    np.testing.assert_allclose(features.mean(axis=0), 0.0, atol=1e-5)
    assert features.var(axis=0).mean() == pytest.approx(1.0, rel=1e-5)


def test_feature_space_puts_real_near_real_and_noise_far(classifier, digits):
    noise = np.random.default_rng(3).integers(0, 256, size=(360, 1, 8, 8), dtype=np.uint8)
    held_out, other, far = (classifier.features(x) for x in (digits[2], digits[0][:360], noise))
    assert frechet_distance(held_out, other) * 10 < frechet_distance(held_out, far)
    assert kernel_distance(held_out, other) < 0.05 < 0.3 < kernel_distance(held_out, far)


def test_an_image_has_the_same_features_in_any_company(classifier, digits):
    images = digits[0][:300]
    together = classifier.features(images)
    np.testing.assert_allclose(classifier.features(images[297:298])[0], together[297], rtol=0, atol=1e-12)
    np.testing.assert_allclose(classifier.features(images[::-1])[::-1], together, rtol=0, atol=1e-12)


def test_tensors_and_arrays_and_read_only_arrays_are_alike(classifier, digits):
    images = digits[2][:5].copy()
    expected = classifier.features(images)
    np.testing.assert_array_equal(classifier.features(torch.from_numpy(images)), expected)
    images.flags.writeable = False
    np.testing.assert_array_equal(classifier.features(images), expected)


def test_no_images_give_no_rows(classifier):
    assert classifier.features(np.zeros((0, 1, 8, 8), np.uint8)).shape == (0, NUM_FEATURES)


def test_same_seed_same_classifier_and_other_seed_another():
    assert quick(seed=5).identity == quick(seed=5).identity
    assert quick(seed=5).identity != quick(seed=6).identity


def test_the_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = quick()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert quick().identity == first.identity


def test_bytes_bring_back_the_same_classifier(classifier, digits):
    data = classifier.to_bytes()
    again = Classifier.from_bytes(data)
    assert (again.identity, again.name, again.shape) == (classifier.identity, classifier.name, (1, 8, 8))
    assert again.to_bytes() == data
    np.testing.assert_array_equal(again.features(digits[2]), classifier.features(digits[2]))
    assert len(classifier.identity) == 64
    assert classifier.name == "convnet-1x8x8-10-classes"


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 13), (2, 24, 16)])
def test_other_image_shapes(shape: tuple[int, int, int]):
    network = quick(shape=shape)
    images = np.random.default_rng(0).integers(0, 256, size=(2, *shape), dtype=np.uint8)
    assert network.features(images).shape == (2, NUM_FEATURES)
    assert Classifier.from_bytes(network.to_bytes()).identity == network.identity


IMAGES = np.zeros((4, 1, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "options", "message"),
    [
        (IMAGES.astype(np.float32), [0, 1, 0, 1], {}, r"^images: must be uint8, got float32$"),
        (IMAGES[:, 0], [0, 1, 0, 1], {}, r"^images: must have shape \[n, C, H, W\]"),
        (IMAGES[:0], [], {}, r"^images: needs at least 1 image of at least 8 x 8"),
        (IMAGES[:, :, :7], [0, 1, 0, 1], {}, r"^images: needs at least 1 image of at least 8 x 8"),
        (IMAGES, [0, 1], {}, r"^labels: must have shape \[4\]"),
        (IMAGES, [0, 1, 2, -1], {}, r"^labels: must be in 0\.\.2, got -1\.\.2$"),
        (IMAGES, [0.0, 1.0, 0.0, 1.0], {}, r"^labels: must be whole numbers"),
        (IMAGES, [1, 1, 1, 1], {}, r"^labels: needs images of at least 2 classes$"),
        (IMAGES, [0, 1, 0, 1], {"num_classes": 1}, r"^num_classes: must be at least 2, got 1$"),
        (IMAGES, [0, 1, 0, 1], {"num_steps": 0}, r"^num_steps: must be at least 1, got 0$"),
        (IMAGES, [0, 1, 0, 1], {"batch_size": 0}, r"^batch_size: must be at least 1, got 0$"),
    ],
)
def test_training_names_the_bad_argument(images, labels, options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        train_classifier(images, labels, seed=0, **{"num_classes": 3, **options})


def test_measuring_names_the_bad_argument(classifier):
    with pytest.raises(ValueError, match=r"^images: must have shape \[n, 1, 8, 8\], got \[2, 3, 8, 8\]$"):
        classifier.features(np.zeros((2, 3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"^labels: must have shape \[4\]"):
        classifier.accuracy(IMAGES, [1])
    with pytest.raises(ValueError, match=r"^images: needs at least 1 image"):
        classifier.accuracy(IMAGES[:0], [])


@pytest.mark.parametrize("damage", ["nothing", "text", "truncated", "foreign", "version"])
def test_reading_names_bad_bytes(classifier, damage: str):
    whole = classifier.to_bytes()
    data = {
        "nothing": b"",
        "text": b"not a classifier at all",
        "truncated": whole[:-100],
        "foreign": safetensors.torch.save({"w": torch.zeros(2)}),
        "version": whole.replace(b'\\"version\\": 1', b'\\"version\\": 7'),
    }[damage]
    with pytest.raises(
        ValueError, match=r"^data: .*(7 is unknown, this program reads version 1|classifier file)$"
    ):
        Classifier.from_bytes(data)
