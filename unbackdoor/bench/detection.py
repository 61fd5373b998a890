"""The detector of a cell: trained on what a defense left, scored clean and triggered."""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from unbackdoor.backbones import Backbone, Source, build, settle_pixels
from unbackdoor.bench.cells import Cell, Detection
from unbackdoor.bench.obtain import Place
from unbackdoor.bench.store import Store, write_json
from unbackdoor.checkpoint import sha256_of
from unbackdoor.detection.jobs import open_detector, train_file
from unbackdoor.detection.network import find_levels
from unbackdoor.detection.precision import coco_metric
from unbackdoor.detection.scores import detection_pictures, score_detector
from unbackdoor.detection.voc import load_voc
from unbackdoor.devices import pick_device, pick_precision
from unbackdoor.errors import DataError
from unbackdoor.evaluation import Known
from unbackdoor.outputs import TrainedFiles, name_trained
from unbackdoor.report import Picture
from unbackdoor.resume import go_on
from unbackdoor.types import OnStep, Say

SHOWN = 2  # images of a cell in the report


def check_detectors(cells: Iterable[Cell], data: str) -> None:
    """Refuse what no detector of a grid's cells could be trained on or scored with.

    Args:
        data: ``voc:DIR``, see ``load_voc``.

    Raises:
        ArchitectureError: If a network yields no maps for a feature pyramid, see ``find_levels``.
        DataError: If the extra ``detection`` is missing, or if images to train on are scored on as
            well; or see ``load_voc``.
    """
    cell = next((cell for cell in cells if cell.detection is not None), None)
    if cell is None or cell.detection is None:  # a grid has one network, and one kind of detector
        return
    try:
        coco_metric()
    except DataError as error:
        raise DataError(
            "a grid with [detection] scores COCO's AP too, which needs torchmetrics and "
            "faster-coco-eval: pip install '.[detection]' where the source is"
        ) from error
    detection, arch, size = cell.detection, cell.victim.arch, cell.victim.size
    found = build(arch)
    pixels = settle_pixels(arch, found, mean=None, std=None, size=size or None)
    backbone = Backbone(found.network, found.heads, mean=pixels.mean, std=pixels.std).eval()
    find_levels(backbone.body, arch, detection.stages)
    learned = load_voc(data, detection.train)
    scored = load_voc(data, detection.test, classes=learned.classes)
    if both := set(learned.paths) & set(scored.paths):
        raise DataError(
            f"{data}: {len(both)} images are in both sets, {detection.train} to train on and "
            f"{detection.test} to score on, {min(both).name} among them; name sets that share none"
        )


def detect_cell(
    cell: Cell,
    source: Source,
    known: Known,
    store: Store,
    place: Place,
    *,
    say: Say,
    on_step: OnStep | None,
) -> dict[str, Any]:
    """Train the detector of a cell, or go on with it, and score it; returns what is recorded.

    Args:
        source: The backbone that the defense left.
        known: The attack that the cell is scored under, planted in images of the backbone's size.

    Raises:
        UnbackdoorError: See ``errors``.
    """
    if cell.detection is None:
        raise ValueError(f"{cell.key} has no detector")
    files = _train(cell.key, cell.detection, source, store, place, say=say, on_step=on_step)
    trained = json.loads(files.record.read_text())
    device = pick_device(place.device)
    precision = pick_precision(place.precision, device)
    opened = open_detector(files.tensors, arch=source.arch, precision=precision)
    scored = score_detector(
        opened,
        load_voc(place.detection, cell.detection.test, classes=opened.classes),
        known,
        data=place.detection,
        side=opened.size,
        measure="both",
        device=device,
        precision=precision,
        on_step=on_step,
    )
    if cell.key in place.pictures:
        pictures = detection_pictures(scored, shown=SHOWN)
        write_json(store.detections_path(cell.key), as_json(pictures), indent=None)
    seconds = {"training": trained["seconds_of_training"], "scoring": scored.record["seconds"]}
    return {**scored.record, "history": trained["history"], "seconds": seconds}


def as_json(pictures: Sequence[Picture]) -> dict[str, Any]:
    """Return pictures as JSON can hold them."""
    return {
        "pictures": [
            {
                "title": picture.title,
                "panels": [panel._asdict() for panel in picture.panels],
                "caption": picture.caption,
            }
            for picture in pictures
        ]
    }


def _train(
    key: str,
    detection: Detection,
    source: Source,
    store: Store,
    place: Place,
    *,
    say: Say,
    on_step: OnStep | None,
) -> TrainedFiles:
    """Return the files of a detector; it is trained unless a run that was killed since did so."""
    out = store.detector_path(key)
    files = name_trained(out)
    train = partial(
        train_file,
        source,
        place.detection,
        out,
        detection.settings,
        name=detection.train,
        stages=detection.stages,
        device=place.device,
        precision=place.precision,
        say=say,
        on_step=on_step,
    )
    if files.record.exists() and _is_of(files.record, source.checkpoint):
        return files
    files.record.unlink(missing_ok=True)  # of a detector on another backbone
    return go_on(train, files.state, say=say)


def _is_of(record: Path, backbone: Path) -> bool:
    made: dict[str, Any] = json.loads(record.read_text())
    return bool(made["backbone"]["sha256"] == sha256_of(backbone))
