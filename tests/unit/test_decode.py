import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encode, photograph
from PIL import Image, ImageOps

from streamswav.crops.decode import decode, image_size, sniff
from streamswav.errors import DecodeError

PHOTOGRAPH = photograph(60, 80)
ENCODED = {
    "jpeg": encode(PHOTOGRAPH),
    "progressive": encode(PHOTOGRAPH, progressive=True),
    "restarts": encode(PHOTOGRAPH, restart_marker_rows=1),
    "grey jpeg": encode(PHOTOGRAPH, mode="L"),
    "cmyk": encode(PHOTOGRAPH, mode="CMYK"),
    "png": encode(PHOTOGRAPH, "PNG"),
    "webp": encode(PHOTOGRAPH, "WEBP"),
    "gif": encode(PHOTOGRAPH, "GIF"),
    "bmp": encode(PHOTOGRAPH, "BMP"),
    "tiff": encode(PHOTOGRAPH, "TIFF"),
    "avif": encode(PHOTOGRAPH, "AVIF"),
    "jpeg2000": encode(PHOTOGRAPH, "JPEG2000"),
    "pnm": encode(PHOTOGRAPH, "PPM"),
}
FORMATS = {"progressive": "jpeg", "restarts": "jpeg", "grey jpeg": "jpeg", "cmyk": "jpeg"}


def decoded(data, **options):
    return decode(data, max_pixels=10**7, **options)


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def reason(data, **options):
    with pytest.raises(DecodeError) as caught:
        decode(data, **{"max_pixels": 10**6} | options)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ENCODED)
def test_every_format_is_told_by_its_bytes_and_decoded_as_pillow_does(name):
    data = ENCODED[name]
    assert sniff(data) == FORMATS.get(name, name)
    assert image_size(data) == (60, 80)
    pixels = decoded(data)
    assert pixels.dtype == np.uint8 and pixels.flags.writeable and pixels.flags.c_contiguous
    assert np.array_equal(pixels, by_pillow(data))


def test_text_and_other_binaries_are_no_image():
    for data in (
        b"BMW is a car",
        b"P1 is a picket line",
        b"II",
        b"{}",
        b"\x1f\x8b\x08",
        b"GIF",
        b"RIFF____WAVE",
    ):
        assert sniff(data) is None
        assert reason(data) == "not_an_image"
    assert sniff(b"") is None
    assert reason(b"") == "empty"


def test_formats_that_cannot_be_read_are_named():
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    assert sniff(heic) == "heic"
    assert reason(heic) == "unsupported"
    assert sniff(b"\xff\x0a\0\0") == "jxl"


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), [(60, 80), (61, 83), (1, 1), (3, 200)])
def test_a_jpeg_at_a_scale_has_its_sides_rounded_up(scale, height, width):
    pixels = decoded(encode(photograph(height, width)), scale=scale)
    assert pixels.shape == (-(-height // scale), -(-width // scale), 3)


@pytest.mark.parametrize("scale", [2, 4])
def test_a_jpeg_at_a_scale_looks_like_the_image_made_smaller(scale):
    data = encode(photograph(96, 128), quality=95)
    smaller = np.asarray(Image.fromarray(by_pillow(data)).reduce(scale))
    assert np.abs(decoded(data, scale=scale).astype(int) - smaller).mean() < 4


def test_scale_leaves_other_formats_and_cmyk_alone():
    for name in ("png", "webp", "cmyk"):
        assert np.array_equal(decoded(ENCODED[name], scale=4), decoded(ENCODED[name]))


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    expected = np.rint(ramp / 257)[:, :, None]
    for data in (
        saved(Image.fromarray(ramp)),
        saved(Image.fromarray(ramp), "TIFF"),
        saved(Image.fromarray(ramp.astype(">u2")), "TIFF"),
        b"P5 80 60 65535\n" + ramp.astype(">u2").tobytes(),
    ):
        assert (decoded(data) == expected).all()


def test_samples_without_a_scale_are_refused():
    floats = np.linspace(-3, 1e6, 64, dtype=np.float32).reshape(8, 8)
    assert reason(saved(Image.fromarray(floats), "TIFF")) == "unsupported"
    assert reason(saved(Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "TIFF")) == "unsupported"


def test_grey_palette_and_transparent_images_become_rgb():
    image = Image.fromarray(PHOTOGRAPH)
    palette = image.quantize(16)
    palette.info["transparency"] = bytes(range(0, 160, 10))
    transparent = image.copy()
    transparent.putalpha(100)
    for data, expected in (
        (saved(image.convert("L")), image.convert("L")),
        (saved(image.convert("1")), image.convert("1")),
        (saved(image.convert("LA")), image.convert("L")),
        (saved(image.quantize(16)), image.quantize(16)),
        (saved(palette), image.quantize(16)),
        (saved(transparent), image),
        (saved(transparent, "WEBP", lossless=True, exact=True), image),
        (saved(image, transparency=(1, 2, 3)), image),
        (saved(image.convert("L"), transparency=7), image.convert("L")),
    ):
        assert np.array_equal(decoded(data), np.asarray(expected.convert("RGB")))


def test_inverted_cmyk_and_ycck_have_the_colours_pillow_sees():
    plain = ENCODED["cmyk"]
    adobe = plain.index(b"Adobe")
    ycck = plain[: adobe + 11] + b"\x02" + plain[adobe + 12 :]
    for data in (plain, ycck):
        assert np.array_equal(decoded(data), by_pillow(data))
    assert not np.array_equal(decoded(plain), decoded(ycck))


def test_the_first_frame_stands_for_an_animation():
    frames = [Image.fromarray(photograph(40, 50, seed=seed)) for seed in range(3)]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        animation = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(decoded(animation), by_pillow(saved(frames[0], kind, **options)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored_unless_asked_for(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(30, 40), kind, exif=exif)
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decoded(data), by_pillow(data))
    assert np.array_equal(decoded(data, exif_orientation=True), turned)
    assert image_size(data, exif_orientation=True) == turned.shape[:2]
    assert image_size(data) == (30, 40)


def test_a_tiff_is_turned_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photograph(30, 40), "TIFF", exif=exif)
    assert image_size(data) == image_size(data, exif_orientation=True) == (40, 30)
    assert np.array_equal(decoded(data), decoded(data, exif_orientation=True))


def test_an_unreadable_exif_block_turns_nothing():
    data = encode(PHOTOGRAPH)
    data = data[:2] + b"\xff\xe1\x00\x0cExif\0\0junk" + data[2:]
    assert np.array_equal(decoded(data, exif_orientation=True), decoded(data))


def png_that_claims(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg_that_claims(width, height):
    data = bytearray(ENCODED["jpeg"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("claim", [png_that_claims, jpeg_that_claims])
def test_pixels_are_bounded_before_anything_is_decoded(claim):
    assert reason(claim(50000, 50000), max_pixels=10**8) == "too_large"
    assert reason(ENCODED["png"], max_pixels=60 * 80 - 1) == "too_large"
    assert reason(ENCODED["jpeg"], max_pixels=60 * 80 - 1, scale=4) == "too_large"
    assert decode(ENCODED["jpeg"], max_pixels=60 * 80).shape == (60, 80, 3)


def test_an_image_without_pixels_is_empty_or_corrupt():
    for data in (png_that_claims(0, 10), png_that_claims(10, 0), jpeg_that_claims(0, 10)):
        assert reason(data) in ("empty", "corrupt")
        with pytest.raises(DecodeError):
            image_size(data)


@pytest.mark.parametrize("name", ENCODED)
def test_a_cut_image_is_an_error_or_whole_never_a_part(name):
    data, whole = ENCODED[name], decoded(ENCODED[name])
    refused = 0
    for length in range(0, len(data), max(1, len(data) // 150)):
        try:
            assert np.array_equal(decoded(data[:length]), whole)
        except DecodeError as error:
            refused += 1
            assert error.reason in ("empty", "not_an_image", "truncated", "corrupt")
    assert refused > 140


@pytest.mark.parametrize("name", ["jpeg", "progressive", "restarts", "grey jpeg", "cmyk"])
def test_a_jpeg_cut_and_closed_again_is_refused(name):
    data = ENCODED[name]
    start = data.index(b"\xff\xda") + 20
    for length in range(start, len(data) - 30, 50):
        between_scans = b"\xff" in data[length - 1 : length + 1]
        assert between_scans or reason(data[:length] + b"\xff\xd9") == "truncated"


def test_reasons_of_cut_images():
    for name in ("jpeg", "progressive", "cmyk", "png", "gif", "webp", "bmp", "tiff"):
        assert reason(ENCODED[name][: len(ENCODED[name]) * 2 // 3]) == "truncated", name


def test_a_jpeg_with_stray_bytes_is_used():
    data = ENCODED["jpeg"]
    assert np.array_equal(decoded(data[:-2] + b"\0\0\0" + data[-2:]), decoded(data))
    assert np.array_equal(decoded(data + b"a trailer"), decoded(data))


def test_a_gap_that_a_harmless_complaint_hides_is_found():
    data = ENCODED["jpeg"]
    strange = data[:11] + b"\x07" + data[12:]
    assert np.array_equal(decoded(strange), decoded(data))
    assert reason(strange[: len(data) // 2] + b"\xff\xd9") == "truncated"


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(["jpeg", "progressive", "cmyk", "png", "webp", "gif", "bmp", "avif"]),
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8
    ),
    cut=st.floats(0, 1),
    orientation=st.booleans(),
)
def test_damage_raises_nothing_but_decode_errors(name, changes, cut, orientation):
    data = bytearray(ENCODED[name])
    for place, value in changes:
        data[int(place**3 * len(data))] = value
    if cut < 0.3:
        del data[int(cut / 0.3 * len(data)) :]
    for use in (decode_within_bounds, image_size):
        try:
            use(bytes(data), exif_orientation=orientation)
        except DecodeError as error:
            assert error.reason in (
                "empty",
                "not_an_image",
                "unsupported",
                "too_large",
                "truncated",
                "corrupt",
            )


def decode_within_bounds(data, **options):
    pixels = decode(data, max_pixels=10**6, **options)
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and 0 < pixels.size <= 3 * 10**6


@settings(max_examples=200, deadline=None)
@given(
    start=st.sampled_from([data[:length] for data in ENCODED.values() for length in (4, 12, 30)]),
    rest=st.binary(max_size=200),
)
def test_garbage_behind_a_signature_raises_nothing_but_decode_errors(start, rest):
    with pytest.raises(DecodeError):
        decode(start + rest, max_pixels=10**6)


def test_filters_of_warnings_are_left_as_they_were():
    before = list(warnings.filters)
    decoded(ENCODED["png"])
    assert reason(ENCODED["png"][:50]) == "truncated"
    assert list(warnings.filters) == before
