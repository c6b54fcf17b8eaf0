"""Encoded images to RGB pixels. Whatever the bytes, only `DecodeError` comes out.

Formats are told by their bytes. JPEG is decoded by libjpeg-turbo through simplejpeg, at a reduced scale where
that is enough; everything else, and JPEG that simplejpeg cannot handle, by Pillow. Transparency is dropped,
as torchvision's loader does.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from streamswav.errors import DecodeError

_SIGNATURES = re.compile(
    rb"(?P<jpeg>\xff\xd8\xff)"
    rb"|(?P<png>\x89PNG\r\n\x1a\n)"
    rb"|(?P<webp>RIFF.{4}WEBP)"
    rb"|(?P<gif>GIF8[79]a)"
    rb"|(?P<bmp>BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0)"
    rb"|(?P<tiff>II[\x2a\x2b]\0|MM\0[\x2a\x2b])"
    rb"|(?P<avif>.{4}ftyp(?:avi[fs]|(?:mif1|msf1).{4}(?:.{4}){0,8}?avi[fs]))"
    rb"|(?P<heic>.{4}ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1))"
    rb"|(?P<jpeg2000>\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51)"
    rb"|(?P<jxl>\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a)"
    rb"|(?P<pnm>P[1-6]\s+[\d#])",
    re.DOTALL,
)

_UNSUPPORTED_MODES = ("F", "LAB")
_PNG_SIZE = struct.Struct(">II")
_EXIF_ORIENTATION = 0x0112
_TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}
"""EXIF orientation: quarter turns to the left, then whether to mirror left to right."""


def sniff(data: bytes) -> str | None:
    """Name the image format of `data` ("jpeg", "png", "webp", ...); None if it is none that is known."""
    match = _SIGNATURES.match(data)
    return match.lastgroup if match else None


def image_size(data: bytes, *, exif_orientation: bool = False) -> tuple[int, int]:
    """Read (height, width) in pixels from the header.

    Args:
        data: an encoded image.
        exif_orientation: as it is once turned by its EXIF orientation.

    Raises:
        DecodeError: there is no image, or its header cannot be read.
    """
    height, width = _header_size(data, _format(data))
    if not height * width:
        raise DecodeError("empty", f"{height} x {width} pixels")
    sideways = exif_orientation and _orientation(data) >= 5
    return (width, height) if sideways else (height, width)


def decode(
    data: bytes, *, max_pixels: int, scale: int = 1, exif_orientation: bool = False
) -> NDArray[np.uint8]:
    """Decode the first frame to RGB.

    Args:
        data: an encoded image.
        max_pixels: height times width beyond which nothing is decoded. Pillow has a bound of its own,
            178,956,970 unless its `MAX_IMAGE_PIXELS` is changed, for what it decodes.
        scale: 1, 2 or 4. A JPEG is decoded at 1/scale, each side rounded up; others are not scaled.
        exif_orientation: turn the image by its EXIF orientation.

    Returns:
        uint8 [H, W, 3], writable.

    Raises:
        DecodeError: with reason "empty", "not_an_image", "unsupported", "too_large", "truncated" or
            "corrupt". Never a part of an image.
    """
    kind = _format(data)
    pixels = (
        _decode_jpeg(data, max_pixels=max_pixels, scale=scale)
        if kind == "jpeg"
        else _decode_with_pillow(data, kind, max_pixels=max_pixels)
    )
    return _turn(pixels, _orientation(data)) if exif_orientation else pixels


def _format(data: bytes) -> str:
    if not data:
        raise DecodeError("empty", "no bytes")
    kind = sniff(data)
    if kind is None:
        raise DecodeError("not_an_image", f"begins with {data[:8].hex(' ')}")
    return kind


def _header_size(data: bytes, kind: str) -> tuple[int, int]:
    if kind == "jpeg":
        return _jpeg_header(data)[:2]
    if kind == "png" and data[12:16] == b"IHDR" and len(data) >= 24:
        return _PNG_SIZE.unpack_from(data, 16)[::-1]
    with _opened(data, kind) as image:
        return image.height, image.width


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
    """Read height, width and colour space; Pillow knows some layouts that simplejpeg does not."""
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        with _opened(data, "jpeg") as image:
            return image.height, image.width, image.mode
    return height, width, colour_space


def _decode_jpeg(data: bytes, *, max_pixels: int, scale: int) -> NDArray[np.uint8]:
    height, width, colour_space = _jpeg_header(data)
    _check_size(height, width, max_pixels)
    smallest = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, **smallest)
    except ValueError as error:
        return _decode_disputed_jpeg(data, str(error), max_pixels=max_pixels)
    if colour_space in ("CMYK", "YCCK"):
        return _decode_with_pillow(data, "jpeg", max_pixels=max_pixels)
    return pixels


def _decode_disputed_jpeg(data: bytes, complaint: str, *, max_pixels: int) -> NDArray[np.uint8]:
    """Judge what simplejpeg refused. It stops at the first complaint of libjpeg, most of which are harmless.

    Where libjpeg says that data is missing, nothing is left to judge. Otherwise Pillow is the arbiter; but
    it fills gaps with grey, and says nothing, so an image that ends in that very grey is refused too.
    """
    if "premature end" in complaint.lower():
        raise DecodeError("truncated", complaint) from None
    if "bad Huffman code" in complaint or "instead of RST" in complaint:
        raise DecodeError("corrupt", complaint) from None
    pixels = _decode_with_pillow(data, "jpeg", max_pixels=max_pixels)
    if (pixels[-4:, -4:] == 128).all():
        raise DecodeError("truncated", f"ends in the grey of missing data; {complaint}") from None
    return pixels


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if not height * width:
        raise DecodeError("empty", f"{height} x {width} pixels")
    if height * width > max_pixels:
        raise DecodeError("too_large", f"{height} x {width} is more than {max_pixels} pixels")


def _decode_with_pillow(data: bytes, kind: str, *, max_pixels: int) -> NDArray[np.uint8]:
    with _opened(data, kind) as image:
        _check_size(image.height, image.width, max_pixels)
        return _rgb(image)


@contextlib.contextmanager
def _opened(data: bytes, kind: str) -> Iterator[Image.Image]:
    """Open with Pillow's reader of that format alone; anything raised inside becomes a `DecodeError`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=[_pillow_name(kind)]) as image:
                yield image
        except DecodeError:
            raise
        # On damaged bytes Pillow's readers raise whatever their code runs into, a dozen types by now.
        except Exception as error:
            raise _decode_error(error, kind, data) from None


def _pillow_name(kind: str) -> str:
    return {"pnm": "PPM", "heic": "HEIF"}.get(kind, kind.upper())


def _decode_error(error: Exception, kind: str, data: bytes) -> DecodeError:
    detail = " ".join(str(error).split())
    if isinstance(error, KeyError) and _pillow_name(kind) not in Image.OPEN:
        return DecodeError("unsupported", f"Pillow reads no {kind} here")
    if isinstance(error, Image.DecompressionBombError):
        return DecodeError("too_large", detail)
    cut = kind == "webp" and len(data) < 8 + int.from_bytes(data[4:8], "little")
    if cut or isinstance(error, EOFError) or "truncated" in detail.lower():
        return DecodeError("truncated", detail)
    if isinstance(error, UnidentifiedImageError):
        return DecodeError("corrupt", f"Pillow cannot read the header of this {kind}")
    return DecodeError("corrupt", f"{type(error).__name__}: {detail}")


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    image.load()
    if image.mode in _UNSUPPORTED_MODES:
        raise DecodeError("unsupported", f"pixels of mode {image.mode}")
    if image.mode.startswith("I"):
        return np.repeat(_from_16_bits(np.asarray(image))[:, :, None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _from_16_bits(grey: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Scale 0..65535 to 0..255, to the nearest. Pillow hands 16 bits out as 32 for some formats."""
    if grey.min() < 0 or grey.max() > 65535:
        raise DecodeError("unsupported", "samples of 32 bits")
    return ((grey.astype(np.int64) + 128) // 257).astype(np.uint8)


def _orientation(data: bytes) -> int:
    """EXIF orientation, 1 to 8; 1, upright, also where none can be read.

    And for TIFF, which Pillow turns by itself.
    """
    kind = _format(data)
    if kind == "tiff":
        return 1
    with contextlib.suppress(DecodeError), _opened(data, kind) as image:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
        return orientation if orientation in _TURNS else 1
    return 1


def _turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    quarters, mirrored = _TURNS.get(orientation, (0, False))
    turned = np.rot90(pixels, quarters)
    return np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)
