"""mosaicml-streaming as a peer of `bench_data`, where it can be imported.

It wants numpy < 2.2, torchvision and the clients of four clouds, none of which its reading of images from a disk or
S3 uses. So it is no dependency of ours, and is installed beside ours without its own:

    pip install --no-deps --target FOLDER mosaicml-streaming==0.13.0 'transformers<5' tokenizers==0.22.1 \
        'huggingface_hub<1' Brotli python-snappy cramjam xxhash zstd catalogue
    PYTHONPATH=FOLDER make bench-data
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader


def load() -> ModuleType | None:
    """The package, or None. It imports torchvision for data sets that are not read here; a blank one will do."""
    for name in (
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    ):
        blank = ModuleType(name)
        blank.__spec__ = ModuleSpec(name, None)
        blank.VisionDataset, blank.to_tensor = object, None  # type: ignore[attr-defined]
        sys.modules.setdefault(name, blank)
    try:
        return importlib.import_module("streaming")
    except ImportError:
        return None


def write(streaming: ModuleType, out: str, files: list[bytes], count: int) -> None:
    """The images as its own shards, at a path or an `s3://` address."""
    os.environ.setdefault("S3_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT_URL", ""))
    with streaming.MDSWriter(out=out, columns={"image": "bytes", "cls": "int"}) as writer:
        for number in range(count):
            writer.write({"image": files[number % len(files)], "cls": number % 10})


def batches(streaming: ModuleType, uri: str, batch: int) -> Iterator[torch.Tensor]:
    """One shuffled epoch, decoded by Pillow as its own decoder of images does it. From S3 with an empty cache."""

    class Decoded(streaming.StreamingDataset):  # type: ignore[name-defined]
        def __getitem__(self, place: Any) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(place)
            pixels = np.array(Image.open(io.BytesIO(sample["image"])))
            return torch.from_numpy(pixels), sample["cls"]

    with tempfile.TemporaryDirectory() as cache:
        where = {"remote": uri, "local": cache} if uri.startswith("s3://") else {"local": uri}
        for images, _ in DataLoader(Decoded(**where, shuffle=True, batch_size=batch), batch_size=batch):
            yield images
