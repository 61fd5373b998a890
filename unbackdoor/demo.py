"""Purify a small backdoored backbone that comes with the package, and score it before and after.

The repair sees what a user's would: a checkpoint and unlabeled images. The trigger and the labels
are used for scores and pictures alone.
"""

import importlib.resources
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from unbackdoor.backbones import Backbone, Source, open_backbone
from unbackdoor.cbd import search
from unbackdoor.checkpoint import write_text
from unbackdoor.data import LabeledImages, load_labeled, split_rows
from unbackdoor.devices import laid_out
from unbackdoor.errors import OutputError
from unbackdoor.evaluation import Split, find_attack, percent, reading_record
from unbackdoor.jobs import purify_file
from unbackdoor.metrics import Reading, Scores, TestSet, fine_tune, make_test_set, read
from unbackdoor.outputs import Outputs, losses_picture, versions
from unbackdoor.probe import extract
from unbackdoor.report import (
    Picture,
    Table,
    amplified_difference,
    as_text,
    images_picture,
    render_report,
    tsne_picture,
)
from unbackdoor.settings import PurifySettings
from unbackdoor.types import Features, OnStep, Say
from unbackdoor.values import flatten

UNLABELED, PROBE = 2_500, 500  # of 5,000; the rest are test images
SHOWN = 8  # images in the report
EMBEDDED = 300  # images of each kind in the t-SNE
CLASSES = 10

SETTINGS = PurifySettings()  # chosen on CIFAR-10, but for trim: docs/experiments/images.md


class DemoResult(NamedTuple):
    """What the demo measured."""

    victim: Reading
    fine_tuned: Reading  # with the probe's 500 labels
    purified: Reading


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    settings: PurifySettings = SETTINGS,
    overwrite: bool = False,
    say: Say = print,
    on_step: OnStep | None = None,
) -> DemoResult:
    """Purify the shipped victim, print scores before and after, and write a report to ``out``.

    Args:
        out: Folder; made if absent.
        seed: Of the split and of the repair.
        settings: Of the repair.

    Raises:
        OutputError: If ``out`` holds an earlier demo and ``overwrite`` is not given.
    """
    started = time.monotonic()
    report = out / "report.html"
    for name in ("report.html", "scores.json", "clean.safetensors", "clean.json", "clean.html"):
        if (out / name).exists() and not overwrite:
            raise OutputError(f"{out / name}: exists already; pass --force to replace it")
    out.mkdir(parents=True, exist_ok=True)
    settings = replace(settings, seed=seed)
    splits = split_images(seed)
    assets = importlib.resources.files("unbackdoor") / "assets"
    record = json.loads((assets / "demo_victim.json").read_text())
    attack = find_attack(str(assets / "demo_victim.json"), size=splits.test.images.shape[-1]).attack
    test = make_test_set(splits.test.images, splits.test.labels, attack, classes=CLASSES)

    with importlib.resources.as_file(assets / "demo_victim.safetensors") as checkpoint:
        mean, std = tuple(record["mean"]), tuple(record["std"])
        source = Source(checkpoint, record["arch"], mean, std, size=splits.test.images.shape[-1])
        victim = laid_out(open_backbone(source).backbone)
        say(f"running: {command_line(source, settings, out)}")
        outputs = purify_file(
            source,
            "fashion-mnist",
            out / "clean.safetensors",
            settings,
            limit=UNLABELED,
            device="cpu",
            overwrite=True,
            say=say,
            on_step=on_step,
        )
    purified = laid_out(open_backbone(replace(source, checkpoint=outputs.tensors)).backbone)

    say("scoring")
    tuned, head = fine_tune(victim, _head(victim), splits.probe.images, splits.probe.labels)
    result = DemoResult(
        victim=read(victim, _head(victim), splits.probe, test, plain=splits.unlabeled),
        fine_tuned=read(tuned, head, splits.probe, test, plain=splits.unlabeled),
        purified=read(purified, _head(purified), splits.probe, test, plain=splits.unlabeled),
    )
    tables = (scores_table(result, splits, test), durability_table(result))
    for table in tables:
        say("\n".join(as_text(table)))
    page = render_report(
        "unbackdoor demo: one backbone, before and after",
        summary(result),
        (*tables, *pictures(victim, purified, splits, test, settings, outputs)),
    )
    write_text(report, page, overwrite=True)
    scores = scores_record(result, settings, seconds=time.monotonic() - started)
    write_text(out / "scores.json", json.dumps(scores, indent=1) + "\n", overwrite=True)
    say(f"wrote {report} and {out / 'scores.json'}")
    return result


def split_images(seed: int) -> Split:
    """Split the embedded Fashion-MNIST images into unlabeled, probe and test images.

    The unlabeled ones are those that ``--images fashion-mnist --limit 2500 --seed SEED`` takes.
    """
    found = load_labeled("fashion-mnist", split="test")
    rows = split_rows(len(found.labels), unlabeled=UNLABELED, probe=PROBE, seed=seed)
    return Split(found.images[rows.unlabeled], found.take(rows.probe), found.take(rows.rest))


def command_line(source: Source, settings: PurifySettings, out: Path) -> str:
    """Return the command that a user would type for the demo's repair, with every setting."""
    words = [
        "unbackdoor purify",
        str(source.checkpoint),
        "--device cpu --arch",
        source.arch,
        "--images fashion-mnist --limit",
        str(UNLABELED),
        "--size",
        str(source.size),
        "--mean",
        *map(str, source.mean or ()),
        "--std",
        *map(str, source.std or ()),
    ]
    for name, value in flatten(asdict(settings)):
        words += [f"--{name.replace('_', '-')}", str(value)]
    return " ".join([*words, "--out", str(out / "clean.safetensors")])


def scores_table(result: DemoResult, splits: Split, test: TestSet) -> Table:
    """Return ACC, ASR and PA through probe and own head, in percent."""
    rows = (
        ("victim", result.victim),
        (f"fine-tuned with {len(splits.probe.labels)} labels", result.fine_tuned),
        ("purified without labels", result.purified),
    )
    return Table(
        "Scores, percent",
        ("backbone", "probe ACC", "probe ASR", "probe PA", "head ACC", "head ASR", "head PA"),
        tuple(
            (name, *percent(reading.probe), *percent(_of_head(reading))) for name, reading in rows
        ),
        decimals=1,
        note=f"ACC on {len(test.labels)} test images; ASR and PA on the {len(test.triggered)} of "
        f"them that are not of the target class, triggered. The probe is linear, trained on "
        f"{len(splits.probe.labels)} other images. The head is the victim's own.",
    )


def durability_table(result: DemoResult) -> Table:
    """Return the probe's ASR as delivered and after what a user does to a backbone, in percent."""
    rows = (
        ("victim", result.victim),
        ("fine-tuned", result.fine_tuned),
        ("purified", result.purified),
    )
    return Table(
        "Does it last? ASR, percent",
        ("backbone", "as delivered", "statistics re-estimated", "fine-tuned on clean images"),
        tuple(
            (name, *(None if scores is None else 100 * scores.asr for scores in readings))
            for name, reading in rows
            for readings in [(reading.probe, reading.reestimated, reading.fine_tuned)]
        ),
        decimals=1,
        note="Batch-norm statistics are re-estimated on the unlabeled images; the fine-tuning has "
        "the probe's labeled ones.",
    )


def summary(result: DemoResult) -> str:
    """Return the result in a few sentences."""
    before, after = result.victim, result.purified
    own_before, own_after = _of_head(before), _of_head(after)
    return (
        f"Through the backbone's own head, the attack success rate went from {own_before.asr:.1%} "
        f"to {own_after.asr:.1%} and clean accuracy from {own_before.acc:.1%} to "
        f"{own_after.acc:.1%}. Through a linear probe, attack success went from "
        f"{before.probe.asr:.1%} to {after.probe.asr:.1%} ({after.worst.asr:.1%} in the worst of "
        f"three readings) and accuracy from {before.probe.acc:.1%} to {after.probe.acc:.1%}. The "
        f"repair had {UNLABELED} unlabeled images and knew neither trigger nor target."
    )


def scores_record(
    result: DemoResult, settings: PurifySettings, *, seconds: float
) -> dict[str, Any]:
    """Return all scores, as shares, with what they come from, as JSON can hold it."""
    return {
        "schema": 2,
        "command": f"unbackdoor demo --seed {settings.seed}",
        "data": "fashion-mnist, the 5,000 embedded test images",
        "settings": asdict(settings),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "seconds": round(seconds, 1),
        "scores": {name: reading_record(reading) for name, reading in result._asdict().items()},
    }


def pictures(
    victim: nn.Module,
    purified: nn.Module,
    splits: Split,
    test: TestSet,
    settings: PurifySettings,
    outputs: Outputs,
) -> tuple[Picture, ...]:
    """Return the report's pictures: triggered images, loss curves, features before and after."""
    target = int(test.goals[0])
    clean = splits.test.images[splits.test.labels != target][:SHOWN]
    triggered = test.triggered[:SHOWN]
    return (
        images_picture(
            "The attack",
            {
                "clean": clean,
                "triggered": triggered,
                "difference": amplified_difference(clean, triggered, gain=1),
            },
            caption="The victim takes the middle row for class "
            f"{target} ({splits.test.classes[target]}).",
        ),
        losses_picture(json.loads(outputs.record.read_text())["history"]),
        tsne_picture(
            "Features of test images",
            {
                "before": feature_groups(victim, splits.test, test, settings),
                "after": feature_groups(purified, splits.test, test, settings),
            },
            strong=("triggered", "searched"),
            seed=settings.seed,
            caption="Searched images are those that the search finds in each backbone.",
        ),
    )


def feature_groups(
    backbone: nn.Module, images: LabeledImages, test: TestSet, settings: PurifySettings
) -> dict[str, Features]:
    """Return features of clean images by class, of triggered and of searched ones."""
    chosen = images.take(slice(EMBEDDED))
    groups = {
        name: extract(backbone, chosen.images[chosen.labels == label])
        for label, name in enumerate(chosen.classes)
    }
    groups["triggered"] = extract(backbone, test.triggered[:EMBEDDED])
    generator = torch.Generator().manual_seed(settings.seed)
    plain = chosen.images.float() / 255
    found = search(backbone, plain, plain, settings, generator=generator)
    with torch.no_grad():
        groups["searched"] = backbone(found)
    return groups


def _of_head(reading: Reading) -> Scores:
    if reading.head is None:
        raise ValueError("the demo's backbone has a head")
    return reading.head


def _head(backbone: Backbone) -> nn.Module:
    return backbone.heads[0]
