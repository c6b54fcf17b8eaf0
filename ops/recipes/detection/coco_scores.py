"""COCO's average precision of a detector, on all ranks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from coco_data import CocoImages, Target
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

_NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_KINDS = {"bbox": "box", "segm": "mask"}


@torch.inference_mode()
def detect(
    detector: nn.Module,
    batches: Iterable[tuple[list[Tensor], list[Target]]],
    categories: list[int],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Return what a detector finds, in COCO's format for results."""
    detector.eval()
    found = []
    for images, targets in batches:
        outputs = detector([image.to(device) for image in images])
        for target, output in zip(targets, outputs, strict=True):
            found += _in_coco_format(int(target["image_id"]), output, categories)
    detector.train()
    return found


def score(data: CocoImages, found: list[dict[str, Any]], *, masks: bool) -> dict[str, float]:
    """Return box AP, and mask AP where wanted, as COCO counts them: shares from 0 to 1.

    What has nothing to count, such as large objects where all are small, is left out.
    """
    kinds = ["bbox", "segm"] if masks else ["bbox"]
    return {f"{_KINDS[kind]}_{name}": value for kind in kinds for name, value in _score(data, found, kind)}


def _score(data: CocoImages, found: list[dict[str, Any]], kind: str) -> list[tuple[str, float]]:
    if not found:
        return [(name, 0.0) for name in _NAMES]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        evaluation = COCOeval(data.coco, data.coco.loadRes([dict(each) for each in found]), kind)
        evaluation.params.imgIds = data.ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [(name, float(value)) for name, value in zip(_NAMES, evaluation.stats, strict=False) if value >= 0]


def _in_coco_format(image_id: int, output: Target, categories: list[int]) -> list[dict[str, Any]]:
    boxes = output["boxes"].cpu().double()
    boxes[:, 2:] -= boxes[:, :2]
    masks = _encode(output["masks"]) if "masks" in output else [None] * len(boxes)
    return [
        {
            "image_id": image_id,
            "category_id": categories[int(label) - 1],
            "bbox": box.tolist(),
            "score": float(confidence),
        }
        | ({"segmentation": mask} if mask else {})
        for box, label, confidence, mask in zip(boxes, output["labels"], output["scores"], masks, strict=True)
    ]


def _encode(masks: Tensor) -> list[dict[str, Any]]:
    """Return probabilities [N, 1, H, W] as run lengths of what is above a half."""
    drawn = (masks[:, 0] > 0.5).byte().cpu().numpy()
    encoded = [coco_mask.encode(np.asfortranarray(each)) for each in drawn]
    return [each | {"counts": each["counts"].decode()} for each in encoded]
