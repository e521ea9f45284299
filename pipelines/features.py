"""A small image classifier, trained on the data set at hand: the feature space that sample sets are judged in.

Distances in its features are not FID: that name belongs to one particular network trained on ImageNet, which
says little about small grey digits. A distance goes with the classifier's `name` and `identity`, and
`to_bytes` keeps the classifier so that the same yardstick measures the next sample set.
"""

import contextlib
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

Images: TypeAlias = npt.NDArray[Any] | Tensor
FloatArray = npt.NDArray[np.float64]

NUM_FEATURES = 32
_SMALLEST_SIDE = 8
_FORMAT_VERSION = 1
# Every forward pass has this many rows, the last one padded: what an image's features are must not depend on
# how many images came with it.
_BATCH_ROWS = 256


class Classifier:
    """A trained network over uint8 images [n, C, H, W], in float64 so that its figures repeat.

    Attributes: `name` (architecture and data shape), `identity` (SHA-256 over the weights, hex), `shape`
    (C, H, W), `num_classes`, `num_features`.
    """

    num_features = NUM_FEATURES

    def __init__(self, network: "_ConvNet") -> None:
        self._network = network.double().eval().requires_grad_(False)
        self.shape = network.shape
        self.num_classes = network.num_classes
        self.name = f"convnet-{'x'.join(map(str, self.shape))}-{self.num_classes}-classes"
        self.identity = _hash_tensors(self._weights())

    def features(self, images: Images) -> FloatArray:
        """Penultimate activations [n, 32] of uint8 `images` [n, C, H, W]. Raises ValueError naming `images`."""
        return self._forward(images, self._network.features, NUM_FEATURES)

    def probabilities(self, images: Images) -> FloatArray:
        """Class probabilities [n, num_classes], rows summing to 1. Raises ValueError naming `images`."""
        return self._forward(images, lambda x: self._network(x).softmax(dim=1), self.num_classes)

    def accuracy(self, images: Images, labels: npt.ArrayLike | Tensor) -> float:
        """Share in [0, 1] of `images` whose most probable class is their label.

        Meaningful on images held out from training. Raises ValueError naming `images` or `labels`.
        """
        predicted = self.probabilities(images).argmax(axis=1)
        if len(predicted) == 0:
            raise ValueError("images: needs at least 1 image to measure accuracy, got 0")
        truth = _check_labels(labels, len(predicted), self.num_classes)
        return float((predicted == truth.numpy()).mean())

    def to_bytes(self) -> bytes:
        """The classifier as one safetensors file; the same classifier always gives the same bytes."""
        header = {"version": _FORMAT_VERSION, "shape": list(self.shape), "num_classes": self.num_classes}
        # One metadata key: safetensors writes several in an order that changes from process to process.
        return safetensors.torch.save(self._weights(), {"classifier": json.dumps(header, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Classifier":
        """The classifier that `to_bytes` wrote. Raises ValueError naming `data` when it is no such file."""
        header = _read_header(data)
        if header.get("version") != _FORMAT_VERSION:
            raise ValueError(
                f"data: classifier format version {header.get('version')!r} is unknown, "
                f"this program reads version {_FORMAT_VERSION}"
            )
        try:
            channels, height, width = header["shape"]
            network = _ConvNet((channels, height, width), header["num_classes"])
            network.load_state_dict(safetensors.torch.load(data))
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError("data: is not a whole classifier file") from error
        return cls(network)

    def _weights(self) -> dict[str, Tensor]:
        # Training ran in float32, so storing float32 loses nothing.
        return {key: value.float().contiguous() for key, value in self._network.state_dict().items()}

    def _forward(self, images: Images, function: Callable[[Tensor], Tensor], width: int) -> FloatArray:
        pixels = _check_images(images, self.shape)
        out = np.empty((len(pixels), width))
        for start in range(0, len(pixels), _BATCH_ROWS):
            batch = pixels[start : start + _BATCH_ROWS]
            num_real = len(batch)
            batch = F.pad(batch, (0, 0, 0, 0, 0, 0, 0, _BATCH_ROWS - num_real))
            with torch.inference_mode():
                out[start : start + num_real] = function(_to_network(batch.double()))[:num_real].numpy()
        return out


def train_classifier(
    images: Images,
    labels: npt.ArrayLike | Tensor,
    *,
    seed: int,
    num_classes: int,
    num_steps: int = 500,
    batch_size: int = 64,
) -> Classifier:
    """Train a classifier on uint8 `images` [n, C, H, W] (H, W at least 8) with `labels` [n] in 0..num_classes−1.

    Cross-entropy, AdamW, a learning rate that rises and falls once, random shifts by up to 1/8 of a side. The
    number of steps is fixed, so the time does not grow with n. A pure function of its arguments on one
    machine: the global random state is neither read nor changed, nor does the number of torch's threads matter.
    Raises ValueError naming the argument.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: must be at least 2, got {num_classes!r}")
    if num_steps < 1:
        raise ValueError(f"num_steps: must be at least 1, got {num_steps!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, got {batch_size!r}")
    pixels = _check_images(images, None)
    targets = _check_labels(labels, len(pixels), num_classes)
    if len(torch.unique(targets)) < 2:
        raise ValueError("labels: needs images of at least 2 classes")

    generator = torch.Generator().manual_seed(seed)
    channels, height, width = pixels.shape[1:]
    network = _ConvNet((channels, height, width), num_classes)
    network.initialise(generator)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=max(2, num_steps))
    with torch.enable_grad(), _one_thread():
        for _ in range(num_steps):
            rows = torch.randint(len(pixels), (batch_size,), generator=generator)
            batch = _shift(_to_network(pixels[rows].float()), generator)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network(batch), targets[rows]).backward()
            optimizer.step()
            rate.step()
        network.standardise(pixels)
    return Classifier(network)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch computes on one thread.

    The steps are so small that threads spend their time waiting for each other: on two cores that were busy with
    other work, 200 steps took 4 to 12 s on one thread and 140 s on two. And the sums' rounding, and with it
    `identity`, depends on their number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _ConvNet(nn.Module):
    """Convolutions down to a 4 × 4 map, then NUM_FEATURES features, then the classes."""

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.shape = shape
        self.num_classes = num_classes
        channels, height, width = shape
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, padding=1, device="meta"), nn.ReLU()]
        last, side = 32, min(height, width)
        while side >= _SMALLEST_SIDE:
            layers += [
                nn.GroupNorm(8, last, device="meta"),
                nn.Conv2d(last, 64, 3, stride=2, padding=1, device="meta"),
                nn.ReLU(),
            ]
            last, side = 64, side // 2
        self.body = nn.Sequential(*layers)
        self.to_features = nn.Linear(last * 16, NUM_FEATURES, device="meta")
        self.to_classes = nn.Linear(NUM_FEATURES, num_classes, device="meta")
        self.register_buffer("feature_mean", torch.empty(NUM_FEATURES, device="meta"))
        self.register_buffer("feature_scale", torch.empty((), device="meta"))
        # Born on "meta" and filled later: PyTorch's own initialisation would draw from the global generator.
        self.to_empty(device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.to_classes(self.penultimate(x))

    def penultimate(self, x: Tensor) -> Tensor:
        maps = self.body(x)
        if maps.shape[2:] != (4, 4):
            maps = F.adaptive_avg_pool2d(maps, 4)
        return F.silu(self.to_features(maps.flatten(1)))

    def features(self, x: Tensor) -> Tensor:
        return (self.penultimate(x) - self.feature_mean) / self.feature_scale

    def standardise(self, pixels: Tensor) -> None:
        """Set the features' origin and unit: mean 0 and average variance 1 over `pixels`.

        The cubic kernel depends on both, and what training happens to leave is arbitrary.
        """
        with torch.no_grad():
            rows = torch.cat(
                [self.penultimate(_to_network(part.float())) for part in pixels.split(_BATCH_ROWS)]
            )
            variance, mean = torch.var_mean(rows.double(), dim=0, correction=0)
            self.feature_mean.copy_(mean)
            self.feature_scale.copy_(variance.mean().sqrt().clamp(min=1e-6))

    def initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)


def _to_network(pixels: Tensor) -> Tensor:
    return pixels / 127.5 - 1.0


def _shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by its own whole number of pixels, edges repeated."""
    batch, channels, height, width = x.shape
    rows = _shifted_range(batch, height, generator)
    columns = _shifted_range(batch, width, generator)
    return x[
        torch.arange(batch)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def _shifted_range(batch: int, size: int, generator: torch.Generator) -> Tensor:
    reach = size // 8
    shift = torch.randint(-reach, reach + 1, (batch, 1), generator=generator)
    return (torch.arange(size) + shift).clamp(0, size - 1)


def _check_images(images: Images, shape: tuple[int, int, int] | None) -> Tensor:
    # A copy, because arrays cut from a file's buffer are read-only and torch warns about sharing those.
    pixels = images.detach().cpu() if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
    if pixels.dtype != torch.uint8:
        raise ValueError(f"images: must be uint8, got {str(pixels.dtype).removeprefix('torch.')}")
    if pixels.ndim != 4:
        raise ValueError(f"images: must have shape [n, C, H, W], got {list(pixels.shape)}")
    if shape is not None and tuple(pixels.shape[1:]) != shape:
        raise ValueError(
            f"images: must have shape [n, {', '.join(map(str, shape))}], got {list(pixels.shape)}"
        )
    if shape is None and (len(pixels) == 0 or pixels.shape[1] == 0 or min(pixels.shape[2:]) < _SMALLEST_SIDE):
        raise ValueError(
            f"images: needs at least 1 image of at least 8 x 8 pixels, got shape {list(pixels.shape)}"
        )
    return pixels


def _check_labels(labels: npt.ArrayLike | Tensor, count: int, num_classes: int) -> Tensor:
    values = torch.as_tensor(np.array(labels))
    if values.shape != (count,):
        raise ValueError(f"labels: must have shape [{count}], one a image, got {list(values.shape)}")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"labels: must be whole numbers, got {str(values.dtype).removeprefix('torch.')}")
    values = values.long()
    if count and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
        raise ValueError(
            f"labels: must be in 0..{num_classes - 1}, got {int(values.min())}..{int(values.max())}"
        )
    return values


def _hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {list(tensors[key].shape)}\n".encode())
        digest.update(tensors[key].numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _read_header(data: bytes) -> dict[str, Any]:
    """Our part of the safetensors header, which `safetensors.torch.load` does not hand out."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["classifier"])
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError("data: is not a classifier file") from error
    if not isinstance(header, dict):
        raise ValueError("data: is not a classifier file")
    return header
