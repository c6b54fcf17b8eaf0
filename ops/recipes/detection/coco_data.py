"""Images and boxes of a data set in COCO's format, dealt by iteration so that a run can go on anywhere."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from streamswav.errors import ConfigError

Target = dict[str, Tensor]


class CocoImages(Dataset[tuple[Tensor, Target]]):
    """One image with its objects, by its place in the list and a seed for the flip.

    Args:
        images: folder of the images.
        annotations: file in COCO's format (`instances_*.json`).
        masks: draw the masks of the objects too.
        train: leave out images without an object, and flip half of the others.

    Attributes:
        coco: the annotations.
        ids: of the images that are used.
        categories: COCO's numbers of the classes; class n of the detector is `categories[n - 1]`.

    Raises:
        ConfigError: the file is not there or not in COCO's format, or no image is left.
    """

    def __init__(self, images: Path, annotations: Path, *, masks: bool, train: bool) -> None:
        self._images, self._masks = images, masks
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it reads
                self.coco = COCO(annotations)
            self.categories = sorted(self.coco.getCatIds())
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise ConfigError(
                "annotations", f"not in COCO's format ({error})", value=str(annotations)
            ) from None
        self._classes = {category: number for number, category in enumerate(self.categories, 1)}
        self.ids = [image for image in sorted(self.coco.getImgIds()) if not train or self._objects(image)]
        if not self.ids:
            raise ConfigError("annotations", "there is no image with an object", value=str(annotations))
        first = self._name(self.ids[0])
        if not (images / first).is_file():
            raise ConfigError("images", f"there is no image {first} in it", value=str(images))
        flip = [v2.RandomHorizontalFlip()] if train else []
        self._transform = v2.Compose([*flip, v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Target]:
        """Return an image [3, H, W] from 0 to 1 and its `boxes` [N, 4], `labels` [N], `masks` [N, H, W]."""
        index, seed = place
        image_id = self.ids[index]
        with Image.open(self._images / self._name(image_id)) as file:
            image = v2.functional.pil_to_tensor(file.convert("RGB"))
        target = self._target(image_id, (image.shape[1], image.shape[2]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixels, target = self._transform(tv_tensors.Image(image), target)
        return pixels.as_subclass(Tensor), {name: each.as_subclass(Tensor) for name, each in target.items()}

    def _name(self, image_id: int) -> str:
        return str(self.coco.loadImgs(image_id)[0]["file_name"])

    def _target(self, image_id: int, size: tuple[int, int]) -> dict[str, Any]:
        objects = self._objects(image_id)
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor(
                [self._classes[each["category_id"]] for each in objects], dtype=torch.int64
            ),
            "image_id": torch.tensor(image_id),
        }
        if self._masks:
            drawn = [torch.from_numpy(self.coco.annToMask(each)) for each in objects]
            target["masks"] = tv_tensors.Mask(torch.stack(drawn) if drawn else torch.zeros(0, *size).byte())
        return target

    def _objects(self, image_id: int) -> list[dict[str, Any]]:
        """Everything in an image that is one object and has an extent."""
        found = self.coco.imgToAnns[image_id]
        return [each for each in found if not each.get("iscrowd") and min(each["bbox"][2:]) > 0]


class ByIteration(Sampler[list[tuple[int, int]]]):
    """Batches of this rank, from any iteration on: what comes depends on the iteration alone.

    Args:
        images: there are in the set.
        batch: images an iteration over all ranks.
        start: first iteration.
        stop: behind the last iteration.
        rank: of this process.
        world: number of processes; divides `batch`.
        seed: of the order and of the flips.
    """

    def __init__(
        self, images: int, *, batch: int, start: int, stop: int, rank: int, world: int, seed: int
    ) -> None:
        self._images, self._batch, self._seed = images, batch, seed
        self._iterations = range(start, stop)
        self._own = slice(rank * batch // world, (rank + 1) * batch // world)

    def __len__(self) -> int:
        return len(self._iterations)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders: dict[int, list[int]] = {}
        for iteration in self._iterations:
            first = iteration * self._batch
            dealt = []
            for number in range(first, first + self._batch):
                turn, place = divmod(number, self._images)
                if turn not in orders:
                    orders = {each: orders[each] for each in orders if each == turn - 1}
                    orders[turn] = self._order(turn)
                dealt.append((orders[turn][place], self._seed + number))
            yield dealt[self._own]

    def _order(self, turn: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + turn)
        return torch.randperm(self._images, generator=generator).tolist()


def gather_images(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Put samples side by side as detectors take them."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
