"""Trains a detector from pretrained weights on a data set in COCO's format, and measures it.

    torchrun --nproc-per-node 8 ops/recipes/detection/detect.py --weights exports/torchvision.pth \
        --train-images coco/train2017 --train-annotations coco/annotations/instances_train2017.json \
        --test-images coco/val2017 --test-annotations coco/annotations/instances_val2017.json \
        --out runs/mask-rcnn

The defaults are Mask R-CNN's 1x schedule as in the paper (table 7). A run that finds its own checkpoint in
`--out` goes on from there, on any number of GPUs that divides the batch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from coco_data import ByIteration, CocoImages, gather_images
from coco_scores import detect, score
from detector import MODELS, build_detector, parameter_groups, share_norms
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from streamswav.arguments import Parser
from streamswav.config import ModelSection, load_config
from streamswav.errors import EXIT_DONE, ConfigError, NonFiniteError, StreamswavError
from streamswav.models import Trunk, build_trunk
from streamswav.stream.store import Store, join, redact
from streamswav.training.checkpoint import pack, unpack
from streamswav.training.distributed import Ranks, join_ranks
from streamswav.transfer.measuring.results import DataUsed, Results, Value
from streamswav.transfer.weights.trunks import open_trunk

CHECKPOINT = "checkpoint.pt"
RESULTS = "results.json"

_SIZES = (640, 672, 704, 736, 768, 800)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_ROLES = ("train", "test")
_PATHS = tuple(f"{role}_{what}" for role in _ROLES for what in ("images", "annotations"))
_FREE = ("out", "device", "workers", "save_every", "log_every", "iterations", *_PATHS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments and return the exit code."""
    args = _parse(argv)
    try:
        with join_ranks(args.device) as ranks:
            torch.manual_seed(args.seed)
            results = run(args, ranks)
            if ranks.leads:
                print(results.to_table())
    except StreamswavError as error:
        sys.stderr.write(f"detect: {error}\n")
        return error.exit_code
    return EXIT_DONE


def run(args: argparse.Namespace, ranks: Ranks) -> Results:
    """Train from wherever `--out` is, measure, and write the results there.

    Raises:
        ConfigError: settings that cannot work, or another run's folder.
        NonFiniteError: a loss that is not a number.
        CheckpointError, StorageError: weights that cannot be loaded.
    """
    if args.batch % ranks.world_size:
        raise ConfigError("--batch", f"is not divisible by {ranks.world_size} ranks", value=args.batch)
    masks = args.model == "mask_rcnn"
    train = CocoImages(args.train_images, args.train_annotations, masks=masks, train=True)
    test = CocoImages(args.test_images, args.test_annotations, masks=False, train=False)
    if test.categories != train.categories:
        raise ConfigError("--test-annotations", "has other categories than the training set")
    trunk, mean, std, source = _open(args)
    images = {"mean": mean, "std": std, "sizes": args.sizes, "longest": args.longest}
    classes = len(train.categories)
    detector = build_detector(args.model, trunk, classes=classes, channels=args.channels, **images)
    detector = share_norms(detector.to(ranks.device), ranks.device)
    fit(detector, train, args, ranks)
    found = detect(detector, _share(test, args, ranks), test.categories, ranks.device)
    scores = score(test, [each for part in ranks.gather(found) for each in part], masks=masks)
    name = f"{args.model}, {args.iterations} iterations"
    value = Value(name, _settings(args), "checkpoint", scores)
    data = {"train": _describe(train, args.train_annotations), "test": _describe(test, args.test_annotations)}
    results = Results(source, data, images, {"detection": args.seed}, [value], command="detect.py")
    ranks.lead(lambda: _store().write(join(args.out, RESULTS), results.to_json().encode()))
    return results


def fit(detector: nn.Module, data: CocoImages, args: argparse.Namespace, ranks: Ranks) -> None:
    """Train until the last iteration: what an iteration does depends on its number and the weights alone.

    Raises:
        ConfigError: the checkpoint in `--out` is of other settings.
        NonFiniteError: a loss that is not a number.
    """
    groups = parameter_groups(detector, args.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=args.rate, momentum=args.momentum)
    begin = _restore(detector, optimizer, args, ranks)
    parallel = _parallel(detector, ranks)
    loader = DataLoader(
        data,
        batch_sampler=ByIteration(
            len(data),
            batch=args.batch,
            start=begin,
            stop=args.iterations,
            rank=ranks.rank,
            world=ranks.world_size,
            seed=args.seed,
        ),
        num_workers=args.workers,
        collate_fn=gather_images,
        pin_memory=ranks.device.type == "cuda",
    )
    detector.train()
    for iteration, (images, targets) in enumerate(loader, begin):
        for group in optimizer.param_groups:
            group["lr"] = args.rate * rate_share(iteration, args)
        torch.manual_seed(hash((args.seed, iteration, ranks.rank)))
        losses = parallel(
            [image.to(ranks.device) for image in images],
            [{name: each.to(ranks.device) for name, each in target.items()} for target in targets],
        )
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        done = iteration + 1
        if done % args.log_every == 0 or done == args.iterations:
            _report(done, losses, optimizer.param_groups[0]["lr"], ranks)
        if done % args.save_every == 0:
            _save(detector, optimizer, done, args, ranks)
    _save(detector, optimizer, max(begin, args.iterations), args, ranks)


def rate_share(iteration: int, args: argparse.Namespace) -> float:
    """Return the share of the rate: linear from `--warmup-factor`, then a tenth after every step."""
    share = 0.1 ** sum(iteration >= step for step in args.steps)
    if iteration >= args.warmup:
        return share
    return share * (args.warmup_factor + (1 - args.warmup_factor) * iteration / args.warmup)


def _store() -> Store:
    """Reach object storage as STREAMSWAV_STORAGE__KEY in the environment says."""
    return Store(load_config(None, os.environ, []).storage)


def _open(args: argparse.Namespace) -> tuple[Trunk, Sequence[float], Sequence[float], dict[str, Any]]:
    """Return the trunk with the normalisation of its images; without weights, one from scratch."""
    if not args.weights:
        trunk = build_trunk(ModelSection(trunk=args.trunk))
        return trunk, *_IMAGENET, {"trunk": args.trunk, "checkpoint": "from scratch"}
    trunk, info = open_trunk(args.weights, storage=_store().section)
    crops, section = info.config.crops, info.config.model
    source = {"trunk": section.trunk, "width": section.width, "checkpoint": redact(info.url)}
    return trunk, crops.mean, crops.std, source


def _parallel(detector: nn.Module, ranks: Ranks) -> nn.Module:
    if ranks.world_size == 1:
        return detector
    places = [ranks.local_rank] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(detector, device_ids=places)


def _restore(
    detector: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace, ranks: Ranks
) -> int:
    """Go on from the checkpoint, if there is one; return the first iteration that is still to be done."""
    store, place = _store(), join(args.out, CHECKPOINT)
    if not ranks.lead(lambda: store.exists(place)):
        return 0
    state = unpack(store.read(place))
    other = [name for name, value in _settings(args).items() if state["settings"].get(name) != value]
    if other:
        name = f"--{other[0].replace('_', '-')}"
        raise ConfigError(name, f"the run in {args.out} has {state['settings'].get(other[0])}")
    detector.load_state_dict(state["detector"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["iteration"])


def _save(
    detector: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    args: argparse.Namespace,
    ranks: Ranks,
) -> None:
    def write() -> None:
        state = {"detector": detector.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"iteration": iteration, "settings": _settings(args)}
        _store().write(join(args.out, CHECKPOINT), pack(state))

    ranks.lead(write)


def _report(done: int, losses: dict[str, torch.Tensor], rate: float, ranks: Ranks) -> None:
    """Write a line of the log.

    Raises:
        NonFiniteError: on every rank, where one has a loss that is not a number.
    """
    values = {name: round(loss.item(), 5) for name, loss in losses.items()}
    finite = all(ranks.gather(all(map(math.isfinite, values.values()))))
    if ranks.leads:
        total = round(sum(values.values()), 5)
        print(json.dumps({"iteration": done, "rate": round(rate, 6), "loss": total, **values}), flush=True)
    if not finite:
        raise NonFiniteError(f"iteration {done}: the loss is not finite; lower --rate, or lengthen --warmup")


def _share(data: CocoImages, args: argparse.Namespace, ranks: Ranks) -> DataLoader[Any]:
    """Deal the test images to the ranks, every one once."""
    own = [[(place, 0)] for place in range(ranks.rank, len(data), ranks.world_size)]
    return DataLoader(data, batch_sampler=own, num_workers=args.workers, collate_fn=gather_images)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that makes another result, as plain data."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {name: value for name, value in plain.items() if name not in _FREE}


def _describe(data: CocoImages, annotations: Path) -> DataUsed:
    return DataUsed([str(annotations)], len(data), len(data.categories))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--weights", default="", help="an export, a run, or a file of weights; default: from scratch")
    add("--trunk", default="resnet50", help="where it starts from scratch")
    add("--model", choices=MODELS, default="mask_rcnn")
    for role in _ROLES:
        add(f"--{role}-images", type=Path, required=True, help="folder")
        add(f"--{role}-annotations", type=Path, required=True, help="JSON in COCO's format")
    add("--out", required=True, help="folder or s3:// prefix for the checkpoint and the results")
    add("--iterations", type=int, default=90_000)
    add("--steps", type=int, nargs="*", default=[60_000, 80_000], help="iterations at which the rate falls")
    add("--batch", type=int, default=16, help="images an iteration, over all ranks")
    add("--rate", type=float, default=0.02, help="learning rate, for the batch as it is")
    add("--warmup", type=int, default=1000, help="iterations")
    add("--warmup-factor", type=float, default=0.001, help="share of the rate at the first iteration")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=1e-4)
    add("--sizes", type=int, nargs="+", default=list(_SIZES), help="shorter sides; the last one measures")
    add("--longest", type=int, default=1333, help="longer side, at most")
    add("--channels", type=int, default=256, help="of the pyramid and the heads")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=2500, help="iterations")
    add("--log-every", type=int, default=50, help="iterations")
    add("--workers", type=int, default=4, help="processes that read, a rank")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
