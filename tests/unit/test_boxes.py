import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from streamswav.crops.boxes import ATTEMPTS, BOX_DRAWS, decoding_scale, draw_boxes
from streamswav.philox import uniforms

ASPECT = (3 / 4, 4 / 3)


def drawn(n, *, height, width, scale, aspect=ASPECT, seed=0):
    scales = np.tile(np.array(scale, dtype=float), (n, 1))
    draws = uniforms(n * BOX_DRAWS, "boxes", seed, height, width).reshape(n, BOX_DRAWS)
    return draw_boxes(draws, height=height, width=width, scales=scales, aspect=aspect)


def box_by_the_rule(draws, *, height, width, scale, aspect):
    """One box, an attempt at a time, as torchvision's documentation tells it."""
    for share, ratio in zip(draws[:ATTEMPTS], draws[ATTEMPTS : 2 * ATTEMPTS], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        stretch = math.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * ratio)
        box_width, box_height = round(math.sqrt(area * stretch)), round(math.sqrt(area / stretch))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(draws[-2] * (height - box_height + 1))
            left = int(draws[-1] * (width - box_width + 1))
            return [top, left, box_height, box_width]
    return None


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    low=st.floats(0.01, 1),
    high=st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
)
def test_every_box_lies_inside_the_image_and_is_not_empty(height, width, low, high, seed):
    boxes = drawn(8, height=height, width=width, scale=sorted((low, high)), seed=seed)
    top, left, box_height, box_width = boxes.T
    assert boxes.dtype == np.int64
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (top + box_height <= height).all() and (left + box_width <= width).all()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (28, 28), (90, 400), (7, 3), (1200, 300)])
def test_boxes_follow_the_rule_attempt_by_attempt(height, width):
    scales = np.array([(0.14, 1.0), (0.05, 0.14), (0.6, 1.0)] * 60)
    draws = uniforms(len(scales) * BOX_DRAWS, height, width).reshape(-1, BOX_DRAWS)
    boxes = draw_boxes(draws, height=height, width=width, scales=scales, aspect=ASPECT)
    for box, row, scale in zip(boxes, draws, scales, strict=True):
        expected = box_by_the_rule(row, height=height, width=width, scale=scale, aspect=ASPECT)
        assert expected is None or box.tolist() == expected


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(10, 1000, (0.6, 1)), (1000, 10, (0.6, 1)), (1, 9, (0.9, 1)), (1, 1, (0.01, 0.1))],
)
def test_where_nothing_fits_the_box_is_torchvisions_central_one(height, width, scale):
    image = torch.empty(3, height, width)
    expected = RandomResizedCrop.get_params(image, list(scale), list(ASPECT))
    assert (drawn(5, height=height, width=width, scale=scale) == np.array(expected)).all()


def test_where_nothing_fits_an_image_of_allowed_shape_is_taken_whole():
    boxes = drawn(5, height=30, width=37, scale=(1, 1), aspect=(1.0, 1.1))
    assert (boxes == (0, 2, 30, 33)).all()
    boxes = drawn(5, height=30, width=37, scale=(1, 1), aspect=(0.1, 1.3))
    assert (boxes == (0, 0, 30, 37)).all()


def distance_of_distributions(a, b):
    """Largest difference of the empirical distribution functions, in units of what chance gives."""
    points = np.concatenate((a, b))
    below = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return np.abs(below[0] - below[1]).max() * math.sqrt(len(a) * len(b) / (len(a) + len(b)))


@pytest.mark.parametrize("scale", [(0.14, 1.0), (0.05, 0.14)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (300, 900)])
def test_boxes_are_distributed_as_torchvisions(height, width, scale):
    torch.manual_seed(0)
    n, image = 3000, torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ASPECT)) for _ in range(n)])
    ours = drawn(n, height=height, width=width, scale=scale)
    for statistic in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] / (height - b[:, 2] + 1),
        lambda b: b[:, 1] / (width - b[:, 3] + 1),
    ):
        assert distance_of_distributions(statistic(ours), statistic(theirs)) < 1.95  # p = 0.001


def test_the_scale_is_the_smallest_that_leaves_every_crop_a_margin():
    def scale(*boxes_and_sizes):
        boxes = np.array([(0, 0, height, width) for height, width, _ in boxes_and_sizes])
        return decoding_scale(boxes, np.array([size for *_, size in boxes_and_sizes]))

    assert scale((500, 500, 224)) == 1
    assert scale((560, 560, 224)) == 2
    assert scale((559, 2000, 224)) == 1
    assert scale((1120, 1120, 224)) == 4
    assert scale((5000, 5000, 224), (240, 240, 96)) == 2
    assert scale((5000, 5000, 224), (96, 96, 96)) == 1
