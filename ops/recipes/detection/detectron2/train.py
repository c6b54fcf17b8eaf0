"""detectron2's own trainer, with the head that the paper's R50-C4 needs. Not run: detectron2 is not here.

python train.py --num-gpus 8 --config-file faster-rcnn-r50-c4-voc.yaml [KEY VALUE]...
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads

_WIDENED = 8  # res5 has so many times the channels of res2


@ROI_HEADS_REGISTRY.register()
class NormedRes5ROIHeads(Res5ROIHeads):
    """The C4 head with a batch norm behind res5 (paper, appendix A.5)."""

    def __init__(self, cfg: Any, input_shape: Any) -> None:
        super().__init__(cfg, input_shape)
        resnet = cfg.MODEL.RESNETS
        self.norm = get_norm(resnet.NORM, _WIDENED * resnet.RES2_OUT_CHANNELS)

    def _shared_roi_transform(self, features: Any, boxes: Any) -> Any:
        return self.norm(super()._shared_roi_transform(features, boxes))


class Trainer(DefaultTrainer):
    """Measures as the data set asks for."""

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> Any:
        """Return what counts on this data set."""
        if dataset_name.startswith("voc"):
            return PascalVOCDetectionEvaluator(dataset_name)
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


def train(args: Namespace) -> Any:
    """Train, or go on with `--resume`, and measure."""
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    given = default_argument_parser().parse_args()
    launch(
        train,
        given.num_gpus,
        num_machines=given.num_machines,
        machine_rank=given.machine_rank,
        dist_url=given.dist_url,
        args=(given,),
    )
