import pickle

import numpy as np
import pytest
import torch
from pictures import encode, photograph
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from streamswav.config import CropsSection
from streamswav.crops import Augment, Column, MultiCrop, centre_crop, collate
from streamswav.crops.boxes import decoding_scale
from streamswav.crops.decode import decode
from streamswav.errors import DecodeError

SECTION = CropsSection()
SMALL = CropsSection(sizes=[28, 16], counts=[2, 4], scales=[(0.14, 1.0), (0.05, 0.14)])
KEY = (1, 2**63 + 5, 17)
JPEG = encode(photograph(375, 500), quality=92)


def crops_of(image, *, section=SECTION, seed=0, key=KEY):
    return MultiCrop(section, seed=seed)(image, key=key)


def equal(one, other):
    pixels = zip(one.pixels, other.pixels, strict=True)
    return torch.equal(one.parameters, other.parameters) and all(torch.equal(*pair) for pair in pixels)


def test_crops_have_the_configured_sizes_and_counts():
    section = CropsSection(sizes=[64, 32, 48], counts=[1, 3, 2], scales=[(0.3, 1.0), (0.05, 0.3), (0.1, 0.2)])
    crops = crops_of(JPEG, section=section)
    assert [tuple(pixels.shape) for pixels in crops.pixels] == [
        (1, 64, 64, 3),
        (3, 32, 32, 3),
        (2, 48, 48, 3),
    ]
    assert all(pixels.dtype == torch.uint8 and pixels.is_contiguous() for pixels in crops.pixels)
    assert crops.parameters.shape == (6, len(Column)) and crops.parameters.dtype == torch.float32


def test_crops_depend_on_seed_key_and_image_alone():
    first = crops_of(JPEG)
    multicrop = MultiCrop(SECTION, seed=0)
    for ordinal in (3, 1, 2):
        multicrop(JPEG, key=(0, 0, ordinal))
    assert equal(multicrop(JPEG, key=KEY), first)
    assert equal(pickle.loads(pickle.dumps(multicrop))(JPEG, key=KEY), first)
    for other in ({"seed": 1}, {"key": (2, *KEY[1:])}, {"key": (1, 5, 17)}, {"key": (*KEY[:2], 18)}):
        assert not equal(crops_of(JPEG, **other), first)


def test_crops_of_one_image_differ_in_box_and_augmentation():
    crops = crops_of(JPEG)
    assert len({pixels.numpy().tobytes() for pixels in crops.pixels[1]}) == 6
    assert len({tuple(row.tolist()) for row in crops.parameters}) == 8


@pytest.mark.parametrize("size", [96, 224])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_crops_are_torchvisions_resized_crops_of_the_same_boxes(size, kind, monkeypatch):
    section = CropsSection(sizes=[size], counts=[12], scales=[(0.05, 1.0)])
    image = encode(photograph(375, 500), kind)
    boxes = boxes_drawn(monkeypatch, section, image)
    pixels = torch.from_numpy(decode(image, max_pixels=10**6)).permute(2, 0, 1)
    for crop, box in zip(crops_of(image, section=section).pixels[0], boxes, strict=True):
        expected = F.resized_crop(pixels, *box.tolist(), size=[size, size], antialias=True)
        assert (crop.permute(2, 0, 1).int() - expected.int()).abs().max() <= 1
        by_pillow = F.resized_crop(
            Image.fromarray(pixels.permute(1, 2, 0).numpy()), *box.tolist(), size=[size, size]
        )
        assert np.abs(crop.numpy().astype(int) - np.asarray(by_pillow)).max() <= 1


def boxes_drawn(monkeypatch, section, image):
    """The boxes of `crops_of`, overheard."""
    boxes = []

    def overhear(drawn, sizes):
        boxes.append(drawn)
        return decoding_scale(drawn, sizes)

    with monkeypatch.context() as patch:
        patch.setattr("streamswav.crops.multicrop.decoding_scale", overhear)
        crops_of(image, section=section)
    return boxes[0]


@pytest.mark.parametrize(("size", "scale"), [(224, 2), (96, 4)])
def test_crops_of_an_image_decoded_smaller_are_those_of_the_whole(size, scale, monkeypatch):
    section = CropsSection(sizes=[size], counts=[8], scales=[(0.5, 1.0)])
    image = encode(photograph(900, 1200), quality=92)
    assert decoding_scale(boxes_drawn(monkeypatch, section, image), np.array([size] * 8)) == scale
    smaller = crops_of(image, section=section).pixels[0].float()
    monkeypatch.setattr("streamswav.crops.multicrop.decoding_scale", lambda boxes, sizes: 1)
    whole = crops_of(image, section=section).pixels[0].float()
    assert not torch.equal(smaller, whole)
    assert (smaller - whole).abs().mean() < 2
    assert (smaller.mean((1, 2)) - whole.mean((1, 2))).abs().max() < 0.5


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 2), (5, 7), (28, 28), (3000, 40)])
def test_images_of_any_shape_are_cropped(height, width):
    image = encode(photograph(height, width), "PNG")
    for section in (SECTION, SMALL):
        crops = crops_of(image, section=section)
        assert [pixels.shape[1] for pixels in crops.pixels] == section.sizes


def test_a_single_pixel_fills_its_crops():
    image = encode(np.array([[[10, 200, 30]]], dtype=np.uint8), "PNG")
    assert all((pixels == torch.tensor((10, 200, 30))).all() for pixels in crops_of(image).pixels)


def test_boxes_lie_in_the_image_as_it_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = photograph(40, 400)
    lying = encode(np.rot90(upright), "PNG", exif=exif)
    turning = SMALL.model_copy(update={"exif_orientation": True})
    assert equal(crops_of(lying, section=turning), crops_of(encode(upright, "PNG"), section=turning))


def test_an_unusable_image_is_a_decode_error():
    for image in (b"", b"no image", JPEG[: len(JPEG) // 2]):
        with pytest.raises(DecodeError):
            crops_of(image)
    with pytest.raises(DecodeError) as caught:
        crops_of(JPEG, section=SECTION.model_copy(update={"max_pixels": 1000}))
    assert caught.value.reason == "too_large"


def test_collate_stacks_crop_major_and_parameters_follow():
    images = [encode(photograph(40, 50, seed=seed), "PNG") for seed in range(3)]
    samples = [crops_of(image, section=SMALL, key=(0, 0, i)) for i, image in enumerate(images)]
    pixels, parameters = collate(samples)
    assert [tuple(each.shape) for each in pixels] == [(2, 3, 28, 28, 3), (4, 3, 16, 16, 3)]
    assert parameters.shape == (6, 3, len(Column))
    for b, sample in enumerate(samples):
        assert torch.equal(parameters[:, b], sample.parameters)
        for resolution, own in zip(pixels, sample.pixels, strict=True):
            assert torch.equal(resolution[:, b], own)


def test_collated_crops_are_augmented_resolution_by_resolution():
    samples = [crops_of(JPEG, section=SMALL, key=(0, 0, i)) for i in range(3)]
    pixels, parameters = collate(samples)
    augment = Augment(SMALL)
    crops = [augment(*pair) for pair in zip(pixels, parameters.split(SMALL.counts), strict=True)]
    assert [tuple(each.shape) for each in crops] == [(6, 3, 28, 28), (12, 3, 16, 16)]
    alone = augment(samples[1].pixels[1][:, None], samples[1].parameters[2:, None])
    assert torch.allclose(crops[1].view(4, 3, 3, 16, 16)[:, 1], alone, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (256, 256), (100, 1000), (20, 30)])
def test_the_centre_crop_is_torchvisions(height, width):
    image = encode(photograph(height, width), "PNG")
    whole = torch.from_numpy(photograph(height, width)).permute(2, 0, 1)
    expected = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])(whole)
    ours = centre_crop(image, resize=256, crop=224, max_pixels=10**7)
    assert ours.shape == (224, 224, 3) and ours.dtype == np.uint8
    assert (torch.from_numpy(ours).permute(2, 0, 1).int() - expected.int()).abs().max() <= 1


def test_the_centre_crop_of_a_large_jpeg_is_that_of_the_whole_in_the_mean():
    pixels = photograph(900, 1200)
    of_jpeg = centre_crop(encode(pixels, quality=95), resize=256, crop=224, max_pixels=10**7)
    of_whole = centre_crop(encode(pixels, "PNG"), resize=256, crop=224, max_pixels=10**7)
    assert np.abs(of_jpeg.astype(int) - of_whole).mean() < 2.5


def test_the_centre_crop_refuses_what_it_cannot_give():
    with pytest.raises(ValueError, match="does not fit"):
        centre_crop(JPEG, resize=224, crop=256, max_pixels=10**6)
    with pytest.raises(DecodeError) as caught:
        centre_crop(encode(photograph(1, 4000), "PNG"), resize=256, crop=224, max_pixels=10**6)
    assert caught.value.reason == "too_large"
