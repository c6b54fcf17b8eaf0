"""Faster and Mask R-CNN of torchvision around a pretrained trunk, with every normalisation learnt.

The trunk is trained whole. Its batch norms, and those that FPN, box head and mask head get besides, are
shared by all ranks on GPUs (paper, appendix A.5, which follows MoCo's protocol): what comes out of a
self-supervised trunk is of another scale than what detectors are tuned for, and learnt norms bring it back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from streamswav.errors import ConfigError
from streamswav.models import Trunk

MODELS = ("faster_rcnn", "mask_rcnn")

_POOLED = 7
_STAGES = ("layer1", "layer2", "layer3", "layer4")


def build_detector(
    name: str,
    trunk: Trunk,
    *,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    sizes: Sequence[int],
    longest: int,
    channels: int = 256,
) -> nn.Module:
    """Build a detector; its norms are shared by all ranks only after `share_norms`.

    Args:
        name: of `MODELS`.
        trunk: with all four stages.
        classes: without the background.
        mean: of the images, from 0 to 1.
        std: likewise.
        sizes: shorter sides in pixels: one is drawn for every training image, the last one measures.
        longest: no image is longer.
        channels: of the pyramid and the heads' convolutions.

    Raises:
        ConfigError: a trunk without a fourth stage.
    """
    if isinstance(trunk.layer4, nn.Identity):
        raise ConfigError("--weights", "the feature pyramid needs four stages, this trunk has three")
    norm, convolutions = nn.BatchNorm2d, [channels] * 4
    levels = {stage: str(number) for number, stage in enumerate(_STAGES)}
    widths = [trunk.inplanes >> shift for shift in (3, 2, 1, 0)]
    backbone = BackboneWithFPN(trunk, levels, widths, channels, norm_layer=norm)
    features, outputs = 4 * channels, classes + 1
    parts = {
        "box_head": FastRCNNConvFCHead((channels, _POOLED, _POOLED), convolutions, [features], norm),
        "box_predictor": FastRCNNPredictor(features, outputs),
    }
    if name == "mask_rcnn":
        parts["mask_head"] = MaskRCNNHeads(channels, convolutions, 1, norm)
        parts["mask_predictor"] = MaskRCNNPredictor(channels, channels, outputs)
    kind = MaskRCNN if name == "mask_rcnn" else FasterRCNN
    images = {"image_mean": list(mean), "image_std": list(std), "min_size": tuple(sizes)}
    return kind(backbone, max_size=longest, **images, **parts)


def share_norms(detector: nn.Module, device: torch.device) -> nn.Module:
    """Share batch statistics over all ranks, which torch can on GPUs only."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(detector) if device.type == "cuda" else detector


def parameter_groups(detector: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return the parameters for an optimizer: those of norms without weight decay, as in detectron2."""
    norms = [part for part in detector.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    of_norms = [each for norm in norms for each in norm.parameters()]
    known = set(map(id, of_norms))
    others = [each for each in detector.parameters() if id(each) not in known]
    return [{"params": others, "weight_decay": weight_decay}, {"params": of_norms, "weight_decay": 0.0}]
