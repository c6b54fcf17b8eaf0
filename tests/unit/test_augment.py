import numpy as np
import pytest
import torch
from pictures import photograph
from PIL import Image, ImageEnhance, ImageFilter
from torchvision.transforms import ColorJitter
from torchvision.transforms.v2 import functional as F

from streamswav.config import CropsSection
from streamswav.crops import ORDERS, Augment, Column, ParameterLaw, normalise, uniforms
from streamswav.crops import augment as augment_module
from streamswav.crops.parameters import PARAMETER_DRAWS

PLAIN = CropsSection(mean=(0, 0, 0), std=(1, 1, 1))
OPERATIONS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
JITTER = (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION, Column.HUE)


def untouched(*shape):
    """Parameters that change nothing."""
    parameters = torch.zeros(*shape, len(Column))
    parameters[..., Column.ORDER] = -1
    parameters[..., list(JITTER[:3])] = 1
    return parameters


def drawn(n, *, seed=0, section=PLAIN):
    draws = uniforms(n * PARAMETER_DRAWS, "augment", seed).reshape(n, -1)
    return torch.from_numpy(ParameterLaw(section).draw(draws))


def photographs(n, size):
    return torch.from_numpy(np.stack([photograph(size, size, seed=seed) for seed in range(n)]))


def augmented(pixels, parameters, section=PLAIN):
    """Levels of 0 to 255, [n, 3, S, S], of images [n, S, S, 3] with one row of parameters each."""
    return 255 * Augment(section)(pixels[None], parameters[None])


def by_torchvision(pixels, row):
    """One image [S, S, 3] through torchvision's operations on floats, in levels."""
    image = pixels.permute(2, 0, 1).float() / 255
    if row[Column.FLIP]:
        image = F.horizontal_flip(image)
    if row[Column.ORDER] >= 0:
        for operation in ORDERS[int(row[Column.ORDER])]:
            image = OPERATIONS[operation](image, float(row[JITTER[operation]]))
    if row[Column.GRAYSCALE]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if row[Column.SIGMA] > 0:
        taps = min(23, 2 * image.shape[-1] - 1)
        image = F.gaussian_blur(image, [taps, taps], [float(row[Column.SIGMA])] * 2)
    return 255 * image


def assert_like_torchvision(pixels, parameters, *, tolerance):
    expected = torch.stack([by_torchvision(*pair) for pair in zip(pixels, parameters, strict=True)])
    assert (augmented(pixels, parameters) - expected).abs().max() < tolerance


def test_parameters_that_change_nothing_change_nothing():
    pixels = photographs(3, 40)
    assert torch.allclose(augmented(pixels, untouched(3)), pixels.permute(0, 3, 1, 2).float(), atol=1e-4)


@pytest.mark.parametrize("column", JITTER)
def test_each_jitter_operation_is_torchvisions(column):
    factors = (-0.5, -0.2, -0.01, 0.0, 0.13, 0.5) if column == Column.HUE else (0.0, 0.2, 0.9, 1.0, 1.3, 1.8)
    pixels, parameters = photographs(len(factors), 48), untouched(len(factors))
    parameters[:, column] = torch.tensor(factors)
    parameters[:, Column.ORDER] = 0
    assert_like_torchvision(pixels, parameters, tolerance=0.02)


@pytest.mark.parametrize("column", [Column.FLIP, Column.GRAYSCALE])
def test_flip_and_grayscale_are_torchvisions(column):
    pixels, parameters = photographs(4, 31), untouched(4)
    parameters[1::2, column] = 1
    assert_like_torchvision(pixels, parameters, tolerance=0.02)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11, 12, 16, 28, 32, 33, 96, 224])
def test_blur_is_torchvisions_with_as_many_taps_as_the_crop_can_reflect(size):
    pixels, parameters = photographs(4, size), untouched(4)
    parameters[:3, Column.SIGMA] = torch.tensor((0.1, 0.7, 2.0))
    assert_like_torchvision(pixels, parameters, tolerance=0.02)


def test_pure_colours_and_greys_turn_as_torchvisions():
    corners = torch.tensor(
        [(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)], dtype=torch.uint8
    )
    pixels, parameters = corners.view(2, 2, 2, 3), untouched(2)
    parameters[:, Column.ORDER], parameters[:, Column.HUE] = 0, 1 / 3
    assert_like_torchvision(pixels, parameters, tolerance=0.02)


def test_every_order_of_the_jitter_is_torchvisions_sequence():
    parameters = drawn(96, section=PLAIN.model_copy(update={"jitter": 1.0, "blur": 0.0}))
    parameters[:, Column.ORDER] = torch.arange(96) % 24
    assert_like_torchvision(photographs(96, 20), parameters, tolerance=0.05)


def test_drawn_parameters_give_what_torchvision_gives():
    assert_like_torchvision(photographs(40, 64), drawn(40, seed=1), tolerance=0.05)


def test_the_mean_agrees_with_pillow():
    pixels, parameters = photographs(64, 96), drawn(64, seed=2)
    expected = np.stack([by_pillow(*pair) for pair in zip(pixels, parameters, strict=True)])
    ours = augmented(pixels, parameters).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - expected).mean() < 1.5


def by_pillow(pixels, row):
    """The paper's own pipeline on one image."""
    image = Image.fromarray(pixels.numpy())
    if row[Column.FLIP]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if row[Column.ORDER] >= 0:
        for operation in ORDERS[int(row[Column.ORDER])]:
            factor = float(row[JITTER[operation]])
            if operation == 3:
                image = F.adjust_hue(image, factor)
            else:
                enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[operation]
                image = enhance(image).enhance(factor)
    if row[Column.GRAYSCALE]:
        image = image.convert("L").convert("RGB")
    if row[Column.SIGMA] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(row[Column.SIGMA])))
    return np.asarray(image)


def test_crops_come_out_crop_major_and_channels_last():
    pixels = photographs(6, 17).view(2, 3, 17, 17, 3)
    crops = Augment(CropsSection())(pixels, untouched(2, 3))
    assert crops.shape == (6, 3, 17, 17) and crops.dtype == torch.float32
    assert crops.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(crops, plainly_normalised(pixels.flatten(0, 1)), atol=1e-5)


def plainly_normalised(pixels):
    images = pixels.permute(0, 3, 1, 2).double() / 255
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.228, 0.224, 0.225))
    return ((images - mean.view(3, 1, 1)) / std.view(3, 1, 1)).float()


def test_normalise_is_by_the_mean_and_spread_of_each_channel():
    pixels, section = photographs(3, 21), CropsSection()
    normalised = normalise(pixels, mean=section.mean, std=section.std)
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(normalised, plainly_normalised(pixels), atol=1e-5)


def test_inputs_stay_as_they_were():
    pixels, parameters = photographs(8, 24), drawn(8)
    copies = pixels.clone(), parameters.clone()
    augmented(pixels, parameters)
    assert torch.equal(pixels, copies[0]) and torch.equal(parameters, copies[1])


def test_chunks_of_any_size_give_the_same_crops(monkeypatch):
    pixels, parameters = photographs(24, 40), drawn(24, seed=4)
    whole = augmented(pixels, parameters)
    monkeypatch.setattr(augment_module, "CPU_CHUNK_PIXELS", 5 * 40 * 40)
    assert torch.allclose(augmented(pixels, parameters), whole, atol=1e-3)
    monkeypatch.setattr(augment_module, "CPU_CHUNK_PIXELS", 1)
    assert torch.allclose(augmented(pixels, parameters), whole, atol=1e-3)


def test_no_figure_is_read_back_from_the_device():
    """The meta device computes nothing, so whatever would wait for its figures fails."""
    pixels = torch.empty((2, 8, 32, 32, 3), dtype=torch.uint8, device="meta")
    crops = Augment(CropsSection())(pixels, drawn(16, seed=3).view(2, 8, -1))
    assert crops.shape == (16, 3, 32, 32) and crops.device.type == "meta"


def test_autocast_does_not_coarsen_the_crops():
    pixels, parameters = photographs(8, 32), untouched(8)
    parameters[:, Column.SIGMA] = 1.5
    expected = augmented(pixels, parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augmented(pixels, parameters), expected)


def test_frequencies_of_the_parameters_are_those_of_the_section():
    section = CropsSection()
    rows = drawn(20000, section=section).numpy()
    jittered = rows[:, Column.ORDER] >= 0
    for happened, probability in (
        (rows[:, Column.FLIP] == 1, section.flip),
        (rows[:, Column.GRAYSCALE] == 1, section.grayscale),
        (rows[:, Column.SIGMA] > 0, section.blur),
        (jittered, section.jitter),
    ):
        assert abs(happened.mean() - probability) < 3.3 * (probability * (1 - probability) / 20000) ** 0.5
    counts = np.bincount(rows[jittered, Column.ORDER].astype(int), minlength=24)
    expected = jittered.sum() / 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # 99.9% of 23 degrees of freedom
    sigma = rows[rows[:, Column.SIGMA] > 0, Column.SIGMA]
    assert sigma.min() >= np.float32(0.1) and sigma.max() <= 2.0 and abs(sigma.mean() - 1.05) < 0.02


@pytest.mark.parametrize("strengths", [(0.8, 0.8, 0.8, 0.2), (1.5, 0.4, 0.0, 0.5)])
def test_factors_are_distributed_as_torchvisions(strengths):
    names = ("brightness", "contrast", "saturation", "hue")
    jitter = ColorJitter(*strengths)
    torch.manual_seed(0)
    theirs = [ColorJitter.get_params(*(getattr(jitter, name) for name in names))[1:] for _ in range(4000)]
    ours = drawn(4000, section=CropsSection(**dict(zip(names, strengths, strict=True)))).numpy()
    for column, drawn_there in zip(JITTER, zip(*theirs, strict=True), strict=True):
        identity = 0 if column == Column.HUE else 1
        expected = [identity if factor is None else factor for factor in drawn_there]
        levels = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
        distance = np.quantile(ours[:, column], levels) - np.quantile(expected, levels)
        assert np.abs(distance).max() < 0.05
