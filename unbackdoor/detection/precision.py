"""Average precision: VOC 2007's 11-point one, and COCO's."""

import importlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchvision.ops import box_iou  # type: ignore[import-untyped]  # it ships no types

from unbackdoor.detection.voc import Boxes, Objects
from unbackdoor.errors import DataError

OVERLAP = 0.5  # of a detection with an object, from which VOC takes it for that object
RECALLS = 11
Measure = Literal["voc07", "coco", "both"]


class Found(NamedTuple):
    """The detections of one image: boxes in pixels, class numbers from 0, scores."""

    boxes: Boxes
    labels: Int64[Tensor, " k"]
    scores: Float[Tensor, " k"]


class CocoPrecision(NamedTuple):
    """COCO's AP: over overlaps from .5 to .95, at .5, and at .75."""

    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None


class Precision(NamedTuple):
    """Average precision as shares in [0, 1]; ``None`` was not asked for.

    Attributes:
        voc07: VOC 2007's, the mean over classes.
        coco: COCO's, the mean over overlaps from .5 to .95.
        coco50: The same at an overlap of .5.
        coco75: The same at an overlap of .75.
        classes: VOC 2007's of every class; ``None`` where there is no object of it.
    """

    voc07: float | None
    coco: float | None
    coco50: float | None
    coco75: float | None
    classes: tuple[float | None, ...]


def average_precision(
    found: Sequence[Found], truth: Sequence[Objects], *, classes: int, measure: Measure = "both"
) -> Precision:
    """Return the average precision of detections in images whose objects are known.

    Args:
        found: What was detected, image by image.
        truth: What is there, in the same order.
        classes: Number of them.
        measure: Which of the two; COCO's needs the extra ``detection``.

    Raises:
        DataError: If no image holds an object that is not difficult, or the extra is missing.
    """
    by_class = tuple(voc_class(found, truth, number) for number in range(classes))
    known = [value for value in by_class if value is not None]
    if not known:
        raise DataError("there is no object to find in these images, so AP is undefined")
    voc07 = sum(known) / len(known) if measure != "coco" else None
    coco = CocoPrecision() if measure == "voc07" else coco_precision(found, truth)
    return Precision(voc07, coco.ap, coco.ap50, coco.ap75, by_class if measure != "coco" else ())


def voc_class(found: Sequence[Found], truth: Sequence[Objects], label: int) -> float | None:
    """Return VOC 2007's average precision of one class, ``None`` if there is no object of it.

    From the highest score down, a detection is right if the object that it overlaps most, by .5 or
    more, was not found before. Difficult objects count neither way. Precision is averaged over the
    11 recalls 0, .1, ..., 1, at each the highest that is reached at this recall or a higher one.

    Source:
        Everingham et al. 2010, section 4.2, and the VOC 2007 development kit.
    """
    objects = sum(int(((x.labels == label) & ~x.difficult).sum()) for x in truth)
    if objects == 0:
        return None
    scores, verdicts = [], []  # a verdict: 1 right, 0 wrong, -1 neither
    for seen, there in zip(found, truth, strict=True):
        mine, theirs = seen.labels == label, there.labels == label
        order = seen.scores[mine].argsort(descending=True, stable=True)
        boxes = seen.boxes[mine][order]
        verdicts += _verdicts(boxes, there.boxes[theirs], there.difficult[theirs].tolist())
        scores.append(seen.scores[mine][order])
    if not verdicts:
        return 0.0
    by_score = torch.cat(scores).argsort(descending=True, stable=True)
    ordered = torch.tensor(verdicts)[by_score]
    hits, misses = (ordered == 1).cumsum(0), (ordered == 0).cumsum(0)
    precision = hits / (hits + misses).clamp(min=1)
    total = 0.0
    for place in range(RECALLS):
        # a sum of tenths would miss recalls that are equal to one, .6 among them
        reached = precision[10 * hits >= place * objects]
        total += reached.max().item() if len(reached) else 0.0
    return total / RECALLS


def _verdicts(boxes: Boxes, objects: Float[Tensor, "m 4"], difficult: list[bool]) -> list[int]:
    """Return for each box, best score first: 1 right, 0 wrong, -1 neither."""
    if len(objects) == 0:
        return [0] * len(boxes)
    overlaps, nearest = box_iou(boxes, objects).max(dim=1)
    taken: set[int] = set()
    verdicts = []
    for overlap, place in zip(overlaps.tolist(), nearest.tolist(), strict=True):
        if overlap < OVERLAP or place in taken:
            verdicts.append(0)
        elif difficult[place]:
            verdicts.append(-1)
        else:
            verdicts.append(1)
            taken.add(place)
    return verdicts


def coco_precision(found: Sequence[Found], truth: Sequence[Objects]) -> CocoPrecision:
    """Return COCO's AP, AP50 and AP75.

    Difficult objects are crowd regions, which count neither way. At most 100 detections an image
    count.

    Raises:
        DataError: If torchmetrics or faster-coco-eval is missing.
    """
    metric = coco_metric()
    predictions = [
        {"boxes": seen.boxes, "labels": seen.labels, "scores": seen.scores} for seen in found
    ]
    targets = [
        {"boxes": there.boxes, "labels": there.labels, "iscrowd": there.difficult.long()}
        for there in truth
    ]
    metric.update(predictions, targets)
    values = metric.compute()
    return CocoPrecision(*(float(values[name]) for name in ("map", "map_50", "map_75")))


def coco_metric() -> Any:
    """Return torchmetrics' mean average precision.

    Raises:
        DataError: If torchmetrics or faster-coco-eval is missing.
    """
    try:
        importlib.import_module("faster_coco_eval")
        detection = importlib.import_module("torchmetrics.detection")
    except ImportError:
        raise DataError(
            "COCO's AP needs torchmetrics and faster-coco-eval: pip install "
            "'.[detection]' where the source is; --measure voc07 needs neither"
        ) from None
    return detection.MeanAveragePrecision(backend="faster_coco_eval")
