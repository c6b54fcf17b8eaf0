"""What an image is called inside a shard."""

from __future__ import annotations

import io

from PIL import Image

from streamswav.crops.decode import image_size, sniff
from streamswav.stream.tar import IMAGE_EXTENSIONS

_EXTENSIONS = {"jpeg": "jpg", "jpeg2000": "jp2", "pnm": "ppm"}


def extension_of(data: bytes) -> str:
    """Return the extension for an encoded image, by its bytes: whatever its file was called.

    Raises:
        DecodeError: this is no image, or its header cannot be read.
    """
    image_size(data)
    kind = sniff(data) or ""
    extension = _EXTENSIONS.get(kind, kind)
    return extension if extension in IMAGE_EXTENSIONS else "image"


def encode_png(image: Image.Image) -> bytes:
    """Encode an image without loss."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
