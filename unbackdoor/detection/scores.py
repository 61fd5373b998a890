"""Score a detector's file: AP on test images as they are, PAP on the same ones triggered."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from unbackdoor.attacks.named import attack_record
from unbackdoor.attacks.triggers import LARGEST, Trigger, trigger_scaled
from unbackdoor.checkpoint import check_output, write_text
from unbackdoor.detection.jobs import Opened, circumstances, open_detector
from unbackdoor.detection.network import fit
from unbackdoor.detection.precision import (
    Found,
    Measure,
    Precision,
    average_precision,
    coco_metric,
)
from unbackdoor.detection.voc import VocImages, load_voc
from unbackdoor.devices import Precision as ComputedIn
from unbackdoor.devices import forget_peak, pick_device, pick_precision, told_of_memory
from unbackdoor.errors import CheckpointError, OutputError
from unbackdoor.evaluation import Known, find_attack, is_record, not_taken, tell_scores
from unbackdoor.report import BoxedImage, Picture, Table, boxes_picture, render_report
from unbackdoor.settings import DetectionSettings, DeviceName, PrecisionName
from unbackdoor.types import OnStep, RawImages, Say

SHOWN = 4  # images in the report
CERTAIN = 0.5  # score of the detections that it shows
FEW = 500  # test images, fewer of which make AP coarse
NAMES = {
    "voc07": "VOC 2007, 11 points, overlap .5",
    "coco": "COCO, overlaps .5 to .95",
    "coco50": "COCO, overlap .5",
    "coco75": "COCO, overlap .75",
}
DEFINITIONS = (
    "AP: average precision on the test images as they are. PAP: the same on the same images "
    "triggered; the trigger is scaled to each image at its own size, before it is scaled for the "
    "network."
)


class Condition(NamedTuple):
    """What was detected under one condition, and how precise it was."""

    precision: Precision
    found: tuple[Found, ...]


class Scored(NamedTuple):
    """A detector with its scores, and all that the pictures of its detections need.

    Attributes:
        record: Of the scores, as JSON can hold it.
        conditions: By name; ``clean`` always, ``triggered`` where there is an attack.
        triggers: By the same names; ``None`` leaves the images as they are.
        side: Of the images that the trigger was planted in, in pixels.
    """

    record: dict[str, Any]
    opened: Opened
    images: VocImages
    conditions: dict[str, Condition]
    triggers: dict[str, Trigger | None]
    side: int


def evaluate_detector(
    path: Path,
    data: str,
    *,
    name: str = "test",
    attack: str | None = None,
    training: Literal["supervised", "simclr"] | None = None,
    arch: str | None = None,
    measure: Measure = "both",
    device: DeviceName = "auto",
    precision: PrecisionName = "auto",
    out: Path | None = None,
    report: Path | None = None,
    overwrite: bool = False,
    say: Say = print,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Score the detector in ``path``; print, return and write.

    Args:
        data: ``voc:DIR``, see ``load_voc``; its classes are the detector's.
        name: The set to score on.
        attack: A victim's record, or the name of one of the paper's attacks; without it, AP alone.
        training: Of the victim, where ``attack`` is a name: it decides where the patch is;
            supervised by default.
        arch: See ``open_detector``.
        measure: Which AP.
        out: Where to write the scores as JSON; nowhere by default.
        report: Where to write an HTML page with scores and pictures; nowhere by default.
        overwrite: Whether these may be replaced.
        on_step: Called after every image with the number of images done and of all images.

    Returns:
        What is written: the record of this evaluation.

    Raises:
        UnbackdoorError: See ``errors``; nothing is written then.
    """
    read = [
        path,
        path.with_suffix(".json"),
        *([Path(attack)] if attack is not None and is_record(attack) else []),
    ]
    for place in (out, report):
        if place is not None:
            check_output(place, overwrite=overwrite, inputs=read)
    if out is not None and report is not None and out.resolve() == report.resolve():
        raise OutputError(f"{out}: both the scores and the report; pass two files")
    if measure != "voc07":
        coco_metric()  # says what is missing before anything is computed
    where = pick_device(device)
    how = pick_precision(precision, where)
    opened = open_detector(path, arch=arch, precision=how)
    images = load_voc(data, name, classes=opened.classes)
    known, side = None, opened.size
    if attack is not None:
        known = find_attack(attack, size=opened.size, training=training)
        side = opened.size if known.side is None else known.side
        if side > LARGEST:
            raise CheckpointError(
                f"{opened.name}: its record says that its backbone was trained on images of {side} "
                f"pixels a side; a trigger is planted in {LARGEST} at most"
            )
    say(f"{path}: {len(images)} images of the set {name}, {len(opened.classes)} classes")
    if known is not None:
        say(f"{known.name}: {known.attack.trigger}, planted in images of {side} × {side} pixels")
    scored = score_detector(
        opened,
        images,
        known,
        data=data,
        side=side,
        measure=measure,
        device=where,
        precision=how,
        on_step=on_step,
    )
    flags = [*scored.record["flags"], "one detector: a table needs three seeds"]
    record = {**scored.record, "flags": flags}
    tables = scores_tables(scored.conditions, opened.classes)
    about = DEFINITIONS if known is not None else DEFINITIONS.partition(" PAP:")[0]
    tell_scores(record, tables, about, out=out, overwrite=overwrite, say=say)
    if report is not None:
        title = f"{path.name} on {Path(data).name}, set {name}"
        summary = " ".join([DEFINITIONS, *(f"Doubt: {flag}." for flag in flags)])
        parts: list[Table | Picture] = [*tables, *detection_pictures(scored, shown=SHOWN)]
        write_text(report, render_report(title, summary, parts), overwrite=overwrite)
        say(f"wrote {report}")
    return record


def score_detector(
    opened: Opened,
    images: VocImages,
    known: Known | None,
    *,
    data: str,
    side: int,
    measure: Measure,
    device: torch.device,
    precision: ComputedIn,
    on_step: OnStep | None = None,
) -> Scored:
    """Score a detector on ``images`` as they are and, under an attack, triggered.

    Args:
        known: The attack; without it, AP alone.
        data: Where ``images`` are; the record holds its last name.
        side: Of the images that the attack was planted in.
        measure: Which AP.
        precision: What the detector was opened with, for the record.

    Raises:
        DataError: If an image is broken, or what COCO's AP needs is missing.
        DeviceError: If the device has no memory left.
    """
    started = time.monotonic()
    forget_peak(device)
    triggers: dict[str, Trigger | None] = {"clean": None}
    if known is not None:
        triggers["triggered"] = known.attack.trigger
    with told_of_memory(device):
        conditions = score_conditions(
            opened.detector,
            images,
            triggers,
            opened.settings,
            side=side,
            measure=measure,
            device=device,
            on_step=on_step,
        )
    record: dict[str, Any] = {
        "schema": 1,
        "kind": "detector's scores",
        "detector": {
            "name": opened.name,
            "sha256": opened.sha256,
            "backbone": opened.record.get("backbone"),
            "arch": opened.record["arch"],
            "settings": opened.record["settings"],
            "trained_on": {
                name: opened.record["data"].get(name) for name in ("source", "set", "sha256")
            },
        },
        "data": {
            "source": Path(data).name,
            "set": images.name,
            "images": len(images),
            "objects": sum(len(there.labels) for there in images.objects),
            "difficult": sum(int(there.difficult.sum()) for there in images.objects),
            "sha256": images.fingerprint,
        },
        "classes": list(opened.classes),
        "attack": None
        if known is None
        else {"name": known.name, "side": side, **attack_record(known.attack)},
        "scores": {key: made.precision._asdict() for key, made in conditions.items()},
        "flags": [*([] if known is None else not_taken(known)), *doubts(opened, images)],
        **circumstances(device, precision),
        "seconds": round(time.monotonic() - started, 1),
    }
    return Scored(record, opened, images, conditions, triggers, side)


def score_conditions(
    detector: nn.Module,
    images: VocImages,
    triggers: dict[str, Trigger | None],
    settings: DetectionSettings,
    *,
    side: int,
    measure: Measure,
    device: torch.device,
    on_step: OnStep | None = None,
) -> dict[str, Condition]:
    """Return detections and their precision under every trigger, by name.

    Args:
        detector: Maps a list of images in [0, 1], as :func:`fit` makes them, to what torchvision's
            detectors return; in eval mode.
        triggers: By the name of the condition; ``None`` leaves the images as they are.
        side: Of the images that the triggers were planted in.
    """
    detector.to(device)
    found: dict[str, list[Found]] = {key: [] for key in triggers}
    for row in range(len(images)):
        image = images.read(row)
        for key, trigger in triggers.items():
            seen = image if trigger is None else trigger_scaled(trigger, image, side=side)
            found[key].append(detect(detector, seen, settings, device=device))
        if on_step is not None:
            on_step(row + 1, len(images))
    return {
        key: Condition(
            average_precision(seen, images.objects, classes=len(images.classes), measure=measure),
            tuple(seen),
        )
        for key, seen in found.items()
    }


@torch.no_grad()
def detect(
    detector: nn.Module, image: RawImages, settings: DetectionSettings, *, device: torch.device
) -> Found:
    """Return what ``detector`` finds in one image, in pixels of the image as it came."""
    fitted = fit(image, settings)
    output = detector([fitted[0].to(device).float() / 255])[0]
    scale = torch.tensor([image.shape[3] / fitted.shape[3], image.shape[2] / fitted.shape[2]])
    boxes = output["boxes"].cpu() * scale.repeat(2)
    return Found(boxes, output["labels"].cpu() - 1, output["scores"].cpu())


def doubts(opened: Opened, images: VocImages) -> list[str]:
    """Return why scores on these images should be read with care."""
    found = []
    if seen := len(opened.trained_on & set(images.fingerprints)):
        found.append(f"the detector was trained on {seen} of these very images")
    if len(images) < FEW:
        found.append(f"only {len(images)} test images")
    for number, name in enumerate(images.classes):
        objects = sum(
            int((there.labels == number)[~there.difficult].sum()) for there in images.objects
        )
        if objects < 10:
            found.append(f"only {objects} objects of the class {name} that are not difficult")
    return found


def scores_tables(conditions: dict[str, Condition], classes: Sequence[str]) -> list[Table]:
    """Return AP and PAP in percent: the means over classes, and VOC's class by class."""
    words = {"clean": "AP", "triggered": "PAP"}
    columns = [words[key] for key in conditions]
    scores = [made.precision for made in conditions.values()]

    def row(name: str, values: Sequence[float | None]) -> tuple[str | float | None, ...]:
        return name, *(None if value is None else 100 * value for value in values)

    means = [
        row(words, [getattr(s, what) for s in scores])
        for what, words in NAMES.items()
        if getattr(scores[0], what) is not None
    ]
    tables = [Table("Average precision, percent", ("measure", *columns), means, decimals=1)]
    if scores[0].classes:
        rows = [row(name, [s.classes[i] for s in scores]) for i, name in enumerate(classes)]
        title = "VOC 2007's average precision by class, percent"
        tables.append(Table(title, ("class", *columns), rows, decimals=1))
    return tables


def detection_pictures(scored: Scored, *, shown: int) -> list[Picture]:
    """Draw the first images of the set: what is there, and what is found in each condition."""
    pictures = []
    images, classes = scored.images, scored.opened.classes
    for row in range(min(shown, len(images))):
        image, truth = images.read(row), images.objects[row]
        names = [classes[label] for label in truth.labels.tolist()]
        panels = {"what is there": BoxedImage(image, truth.boxes, names, names)}
        for key, trigger in scored.triggers.items():
            seen = image if trigger is None else trigger_scaled(trigger, image, side=scored.side)
            boxes, labels, scores = scored.conditions[key].found[row]
            sure = scores >= CERTAIN
            names = [classes[label] for label in labels[sure].tolist()]
            texts = [
                f"{name} {score:.2f}"
                for name, score in zip(names, scores[sure].tolist(), strict=True)
            ]
            panels[f"found, {key}"] = BoxedImage(seen, boxes[sure], names, texts)
        pictures.append(
            boxes_picture(
                images.paths[row].name,
                panels,
                classes=classes,
                caption=f"Detections with a score of {CERTAIN} or more.",
            )
        )
    return pictures
