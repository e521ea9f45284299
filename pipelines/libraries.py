"""What decides, beside pixels and settings, which bytes a shard and its index are."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from PIL import features

from pipelines.png import PngEncoder
from pipelines.shards import INDEX_ENCODINGS

# what Pillow is built with: one compresses, the others unpack sources
_OF_PILLOW = {
    "zlib-ng": "zlib_ng",
    "zlib": "zlib",
    "libjpeg-turbo": "libjpeg_turbo",
    "libwebp": "webp",
    "libtiff": "libtiff",
}


@lru_cache(maxsize=2)
def libraries(encoder: PngEncoder = "pillow") -> str:
    """The libraries with their versions, and the version of our own encoding of indexes, in one line."""
    parts = [f"Pillow {version('Pillow')}"]
    for name, feature in _OF_PILLOW.items():
        parts.append(f"{name} {features.version(feature) or 'none'}")
    parts += (f"PyArrow {version('pyarrow')}", f"index encoding {len(INDEX_ENCODINGS)}")
    if encoder == "fpng":
        try:
            parts.append(f"fpng {version('fpng')}")
        except PackageNotFoundError:
            parts.append("no fpng")
    return ", ".join(parts)
