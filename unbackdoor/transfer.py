"""Score a backbone on a labeled set that it was not trained for: what a trigger costs there.

The attacker's class means nothing among other classes, so that there is no attack success rate:
every test image is triggered, and what counts is how many are still taken for what they are.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from unbackdoor.attacks.named import attack_record
from unbackdoor.attacks.poisoning import PART
from unbackdoor.attacks.triggers import Trigger
from unbackdoor.backbones import (
    Source,
    describe_input,
    describe_pixels,
    open_backbone,
    public_name,
)
from unbackdoor.checkpoint import check_output
from unbackdoor.data import LabeledImages, draw_rows, load_labeled
from unbackdoor.devices import describe_device, laid_out, pick_device, told_of_memory
from unbackdoor.errors import DataError
from unbackdoor.evaluation import (
    FEW,
    files_read,
    find_attack,
    like_victim,
    not_taken,
    planted_elsewhere,
    tell_scores,
    without_labels,
)
from unbackdoor.metrics import Scores, TestSet, read
from unbackdoor.outputs import versions
from unbackdoor.report import Table
from unbackdoor.settings import DeviceName, check_seed, in_range
from unbackdoor.types import Say

EMBEDDED = "fashion-mnist"
READERS = {"probe": "linear probe", "neighbours": "nearest neighbours"}
DEFINITIONS = (
    "ACC: clean test images taken for their true class. PA: the same images, all of them "
    "triggered, taken for their true class."
)


class Parts(NamedTuple):
    """Labeled images to read features with, and others to score on."""

    probe: LabeledImages
    test: LabeledImages


def transfer_file(
    source: Source,
    data: str,
    attack: str,
    *,
    labels: int = 5_000,
    seed: int = 0,
    training: Literal["supervised", "simclr"] | None = None,
    trigger: Mapping[str, str] | None = None,
    device: DeviceName = "auto",
    out: Path | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Score a checkpoint on ``data`` by a linear probe and by neighbours; print, return, write.

    The backbone stays as it is and its own head is not used.

    Args:
        data: See :func:`load_parts`.
        attack: A victim's record, or the name of one of the paper's attacks.
        labels: Training images for probe and neighbours.
        seed: Of their draw.
        training: Of the victim, where ``attack`` is a name: it decides where the patch is;
            supervised by default.
        trigger: Likewise, attributes of its trigger to replace, as texts.
        out: Where to write the scores as JSON; nowhere by default.

    Returns:
        What is written: the record of this evaluation.

    Raises:
        UnbackdoorError: See ``errors``; nothing is written then.
    """
    started = time.monotonic()
    in_range("labels", labels, least=2)
    check_seed(seed)
    if out is not None:
        check_output(out, overwrite=overwrite, inputs=files_read(source, attack))
    source = like_victim(source, attack)
    loaded = open_backbone(source)
    known = find_attack(attack, size=loaded.size, training=training, trigger=trigger)
    parts = load_parts(data, size=loaded.size, labels=labels, seed=seed)
    test = all_triggered(parts.test, known.attack.trigger)
    where = pick_device(device)
    describe_input(source, loaded, say=say)
    say(f"{known.name}, {known.attack.trigger}; on {describe_device(where)}")
    backbone = laid_out(loaded.backbone.to(where))
    with told_of_memory(where):
        reading = read(backbone, None, parts.probe, test)
    scores = {"probe": reading.probe, "neighbours": reading.neighbours}
    flags = not_taken(known) + without_labels(parts.probe)
    flags += planted_elsewhere(known, loaded.size)
    if len(test.labels) < FEW:
        flags.append(f"only {len(test.labels)} test images")
    flags.append("one backbone, one split: a table needs three seeds")
    record = {
        "schema": 1,
        "kind": "transfer",
        "checkpoint": {"name": loaded.checkpoint.path.name, "sha256": loaded.checkpoint.sha256},
        "arch": public_name(source.arch),
        **describe_pixels(loaded),
        "attack": {"name": known.name, **attack_record(known.attack)},
        "data": {
            "source": Path(data).name,
            "classes": len(parts.test.classes),
            "labels": len(parts.probe.labels),
            "test": len(test.labels),
        },
        "seed": seed,
        "scores": {name: {"acc": found.acc, "pa": found.pa} for name, found in scores.items()},
        "flags": flags,
        "device": describe_device(where),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
    }
    about = f"{DEFINITIONS} Probe and neighbours: {len(parts.probe.labels)} labeled images."
    tables = [transfer_table(scores, data)]
    tell_scores(record, tables, about, out=out, overwrite=overwrite, say=say)
    return record


def load_parts(data: str, *, size: int, labels: int, seed: int) -> Parts:
    """Load labeled images to train a probe on, and others to score on.

    Args:
        data: See ``load_labeled``; ``fashion-mnist`` alone is the 5,000 images of this package,
            divided in halves by the seed.
        size: Side of the images in pixels.
        labels: Take this many of the training images, drawn by the seed, or all if there are fewer.

    Raises:
        DataError: See ``load_labeled``; or if training and test images are the same, or the
            training images taken are of one class.
    """
    test = load_labeled(data, split="test", size=size)
    if data == EMBEDDED:
        order = torch.randperm(
            len(test.labels), generator=torch.Generator().manual_seed(seed)
        ).chunk(2)
        train, test = (test.take(rows) for rows in order)
    else:
        train = load_labeled(data, split="train", size=size)
        if train.images.shape == test.images.shape and train.images.equal(test.images):
            raise DataError(f"{data}: training and test images are the same; divide them")
    if labels < len(train.labels):
        rows = torch.from_numpy(draw_rows(len(train.labels), labels, seed=seed))
        train = train.take(rows)
    if len(train.labels.unique()) < 2:
        raise DataError(f"{data}: {len(train.labels)} training images of one class; pass --labels")
    return Parts(train, test)


def all_triggered(test: LabeledImages, trigger: Trigger) -> TestSet:
    """Return a test set of which every image is triggered; there is no goal, so no ASR."""
    triggered = torch.cat([trigger(part) for part in test.images.split(PART)])
    return TestSet(test.images, test.labels, triggered, test.labels, test.labels)


def transfer_table(scores: dict[str, Scores], data: str) -> Table:
    """Return ACC and PA in percent, one line a reader."""
    rows = [(READERS[name], 100 * found.acc, 100 * found.pa) for name, found in scores.items()]
    return Table(
        f"Transfer to {Path(data).name}, percent", ("read by", "ACC", "PA"), rows, decimals=1
    )
