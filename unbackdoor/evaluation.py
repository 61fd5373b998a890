"""Score a checkpoint under attack: which rows, which readings, and what to doubt about them."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from unbackdoor.attacks.named import ATTACKS, attack_from_record, attack_record, named_attack
from unbackdoor.attacks.poisoning import Attack
from unbackdoor.attacks.triggers import LARGEST
from unbackdoor.backbones import (
    Backbone,
    Source,
    describe_input,
    describe_pixels,
    open_backbone,
    public_name,
)
from unbackdoor.checkpoint import check_output, write_text
from unbackdoor.data import LabeledImages, load_both
from unbackdoor.devices import describe_device, laid_out, pick_device, told_of_memory
from unbackdoor.errors import CheckpointError, DataError, SettingsError, printable
from unbackdoor.metrics import Reading, Scores, make_test_set, read
from unbackdoor.outputs import versions
from unbackdoor.report import Table, as_text
from unbackdoor.roles import divide_rows
from unbackdoor.settings import DeviceName, check_seed
from unbackdoor.types import RawImages, Say

TOOK = 0.9  # own-head ASR from which a supervised victim counts as backdoored
LOST = 0.15  # accuracy lost on triggered images from which a SimCLR victim does; a clean one: .11
FELL = 0.15  # of accuracy; a fine-tuning that costs more has broken the network
FEW = 200  # triggered images, fewer of which make ASR coarse
DEFINITIONS = (
    "ACC: clean test images taken for their true class. ASR: triggered ones, of other classes than "
    "the target, taken for the target (all-to-all: for their class plus one). PA: the same ones "
    "taken for their true class."
)


class Split(NamedTuple):
    """The images that a defense and its scores use; none is poisoned, none has two roles."""

    unlabeled: RawImages  # for the defense, and to re-estimate statistics on
    probe: LabeledImages  # for the probe, the neighbours, the fine-tuning
    test: LabeledImages
    validation: LabeledImages | None = None  # for whoever chooses settings


class Known(NamedTuple):
    """An attack, and what its victim's record says about it."""

    attack: Attack
    name: str
    supervised: bool
    victim_asr: float | None = None  # through the victim's own head
    victim_loss: float | None = None  # its ACC minus its PA, through a probe
    victim_acc: float | None = None  # through its own head; an all-to-all ASR cannot be higher
    side: int | None = None  # of the images that its trigger was planted in, in pixels


def evaluate_file(
    source: Source,
    data: str,
    attack: str,
    *,
    seed: int = 0,
    durable: bool = False,
    training: Literal["supervised", "simclr"] | None = None,
    target: int | None = None,
    trigger: Mapping[str, str] | None = None,
    device: DeviceName = "auto",
    out: Path | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Score a checkpoint through its own head, a probe and neighbours; print, return, write.

    Args:
        data: A labeled set, see ``load_labeled``.
        attack: A victim's record, or the name of one of the paper's attacks.
        seed: Of the split into unlabeled and probe images, those of ``purify --seed``.
        durable: Read again after re-estimation and after a clean fine-tuning.
        training: Of the victim, where ``attack`` is a name: it decides where the patch is;
            supervised by default.
        target: The attacker's class, where ``attack`` is a name.
        trigger: Likewise, attributes of its trigger to replace, as texts.
        out: Where to write the scores as JSON; nowhere by default.

    Returns:
        What is written: the record of this evaluation.

    Raises:
        UnbackdoorError: See ``errors``; nothing is written then.
    """
    started = time.monotonic()
    check_seed(seed)
    if out is not None:
        check_output(out, overwrite=overwrite, inputs=files_read(source, attack))
    source = like_victim(source, attack)
    loaded = open_backbone(source)
    known = find_attack(attack, size=loaded.size, training=training, target=target, trigger=trigger)
    split = load_split(data, size=loaded.size, seed=seed)
    where = pick_device(device)
    goal = f"class {known.attack.target}"
    if known.attack.goal == "all-to-all":
        goal = "each class plus one"
    describe_input(source, loaded, say=say)
    say(f"{known.name}, {known.attack.trigger}, to {goal}; on {describe_device(where)}")
    backbone = laid_out(loaded.backbone.to(where))
    with told_of_memory(where):
        reading = read_split(backbone, split, known.attack, durable=durable)
    scored = reading.probe
    say(f"{scored.images} test images, {scored.triggered} of them triggered as well")
    unread = unread_head(backbone, reading, classes=len(split.test.classes))
    flags = unread + doubts(known, reading, split.probe)
    record = {
        "schema": 1,
        "checkpoint": {"name": loaded.checkpoint.path.name, "sha256": loaded.checkpoint.sha256},
        "arch": public_name(source.arch),
        **describe_pixels(loaded),
        "attack": {"name": known.name, **attack_record(known.attack)},
        "data": {"source": Path(data).name, **counts(split)},
        "seed": seed,
        "scores": reading_record(reading),
        "flags": flags,
        "device": describe_device(where),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
    }
    about = f"{DEFINITIONS} Probe and neighbours: {len(split.probe.labels)} labeled images."
    tell_scores(record, [scores_table(reading)], about, out=out, overwrite=overwrite, say=say)
    return record


def tell_scores(
    record: Mapping[str, Any],
    tables: Iterable[Table],
    about: str,
    *,
    out: Path | None,
    overwrite: bool,
    say: Say,
) -> None:
    """Say scores, what they are, and the doubts about them; write their record to ``out``."""
    for table in tables:
        say("\n".join(as_text(table)))
    say(about)
    for flag in record["flags"]:
        say(f"doubt: {flag}")
    if out is not None:
        write_text(out, json.dumps(record, indent=1) + "\n", overwrite=overwrite)
        say(f"wrote {out}")


def load_split(data: str, *, size: int, seed: int) -> Split:
    """Load a labeled set and divide it, see :func:`divide`; errors are also ``load_labeled``'s."""
    return divide(*load_both(data, size=size), seed=seed)


def divide(train: LabeledImages, test: LabeledImages, *, seed: int) -> Split:
    """Divide the training images: 5 % unlabeled, 1 % for the probe, 5 % for validation.

    Raises:
        DataError: If there are too few images, or if training and test images are the same.
    """
    if train.images.shape == test.images.shape and train.images.equal(test.images):
        raise DataError(
            "training and test images are the same; pass data with a train and a test part, such "
            "as folders of these names"
        )
    count = len(train.labels)
    if len(train.labels.unique()) < 2:
        raise DataError(f"all {count} training images are of one class; two or more are needed")
    rows = divide_rows(count, seed=seed)
    if len(train.labels[rows.probe].unique()) < 2:
        raise DataError(
            f"1 % of {count} training images are too few for a probe: {len(rows.probe)} of one "
            "class"
        )
    unlabeled, validation = train.images[rows.unlabeled], train.take(rows.validation)
    return Split(unlabeled, train.take(rows.probe), test, validation)


def read_split(backbone: Backbone, split: Split, attack: Attack, *, durable: bool) -> Reading:
    """Score a backbone under an attack by its own head, a probe and neighbours.

    Args:
        durable: Read again after re-estimation and after a clean fine-tuning.
    """
    images, labels, classes = split.test
    test = make_test_set(images, labels, attack, classes=len(classes))
    plain = split.unlabeled if durable else None
    return read(backbone, own_head(backbone, classes=len(classes)), split.probe, test, plain=plain)


def is_record(attack: str) -> bool:
    """Return whether ``attack`` is a victim's record, there or not; a known name goes first."""
    is_path = attack.endswith(".json") or Path(attack).name != attack or Path(attack).is_file()
    return attack not in ATTACKS and is_path


def files_read(source: Source, attack: str) -> list[Path]:
    """Return the files that a scoring reads, and never writes, beside its data."""
    return [source.checkpoint, *([Path(attack)] if is_record(attack) else [])]


def like_victim(source: Source, attack: str) -> Source:
    """Return ``source`` with the images' size and normalization of the victim in the record.

    What is given goes first; a record of another architecture, or a name, says nothing.
    """
    if not is_record(attack):
        return source
    record = read_victim(attack)
    if record.get("arch") != public_name(source.arch):
        return source

    def levels(name: str) -> tuple[float, ...] | None:
        values = record.get(name)
        good = isinstance(values, list) and all(isinstance(v, int | float) for v in values)
        return tuple(values) if good and values else None

    return replace(
        source,
        mean=source.mean or levels("mean"),
        std=source.std or levels("std"),
        size=side_in(record) if source.size is None else source.size,
    )


def side_in(record: Mapping[str, Any]) -> int | None:
    """Return the side of a victim's images in pixels, where its record holds a sensible one."""
    size = record.get("size")
    return size if isinstance(size, int) and 0 < size <= LARGEST else None


def read_victim(path: str) -> Mapping[str, Any]:
    """Return a victim's record.

    Raises:
        CheckpointError: If the file is no JSON object.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no victim's record: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: is no victim's record, but a {type(record).__name__}")
    return record


def find_attack(
    attack: str,
    *,
    size: int,
    training: Literal["supervised", "simclr"] | None = None,
    target: int | None = None,
    trigger: Mapping[str, str] | None = None,
) -> Known:
    """Return the attack that a victim's record, or a name, stands for.

    Raises:
        SettingsError: If there is no such attack, the record is of another kind, or something is
            given that a record says.
        CheckpointError: If the file is absent or no JSON object.
        DataError: If the record is of a clean victim.
    """
    if not is_record(attack):
        training = training or "supervised"
        options = {} if target is None else {"target": target}
        found = named_attack(attack, size=size, training=training, options=options, trigger=trigger)
        return Known(found, attack, training == "supervised")
    if training is not None or target is not None or trigger:
        raise SettingsError(
            f"{attack} is a record, which says how the victim was trained, what its target is and "
            "what was planted: none of it is given as well"
        )
    record = read_victim(attack)
    described = record.get("attack")
    if not isinstance(described, dict):
        raise DataError(
            f"{attack}: holds no attack (a clean victim's does not); pass an attack's name: "
            f"{', '.join(ATTACKS)}"
        )
    found = attack_from_record(described)
    return known_from(record, found, printable(str(described.get("name"))))


def known_from(record: Mapping[str, Any], attack: Attack, name: str) -> Known:
    """Return ``attack`` with what its victim's record says; a clean victim's says nothing."""
    acc, pa, head_acc, asr = (
        _number(record, "scores", *names)
        for names in (("probe", "acc"), ("probe", "pa"), ("head", "acc"), ("head", "asr"))
    )
    lost = None if acc is None or pa is None else acc - pa
    supervised = _inside(record, "training", "kind") != "simclr"
    return Known(attack, name, supervised, asr, lost, head_acc, side_in(record))


def _inside(record: Any, *names: str) -> Any:
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    return record


def _number(record: Any, *names: str) -> float | None:
    value = _inside(record, *names)
    return value if isinstance(value, int | float) else None


def own_head(backbone: Backbone, *, classes: int) -> nn.Module | None:
    """Return the backbone's own head; none if it has none, or it tells other classes apart."""
    if len(backbone.heads) != 1:
        return None
    head = backbone.heads[0]
    if not isinstance(head, nn.Linear) or head.out_features != classes:
        return None
    return head


def unread_head(backbone: Backbone, reading: Reading, *, classes: int) -> list[str]:
    """Return a doubt where a backbone has heads of its own and none was read."""
    if reading.head is not None or not backbone.heads:
        return []
    names = ", ".join(backbone.head_names)
    return [f"the own head ({names}) is not one linear layer of {classes} classes: unread"]


def doubts(known: Known, reading: Reading, probe: LabeledImages) -> list[str]:
    """Return why these scores, read with the labels of ``probe``, should be read with care."""
    found = doubts_of_seed(known, reading, probe)
    return [*found, "one victim, one split: a table needs three seeds"]


def doubts_of_seed(known: Known, reading: Reading, probe: LabeledImages) -> list[str]:
    """Return why scores should be read with care, but for there being one seed of them."""
    target = known.attack.target if known.attack.goal == "all-to-one" else None
    found = not_taken(known) + without_labels(probe, target=target)
    found += planted_elsewhere(known, probe.images.shape[-1])
    chance = 1 / len(probe.classes)
    if known.victim_acc is not None and known.victim_acc < chance + 0.1 * (1 - chance):
        found.append(
            f"the victim's own accuracy was {100 * known.victim_acc:.1f} %, where guessing has "
            f"{100 * chance:.1f}: it learned nothing that could be kept"
        )
    if reading.probe.triggered < FEW:
        found.append(f"only {reading.probe.triggered} triggered images")
    return found + broken_by_tuning(reading)


def broken_by_tuning(reading: Reading) -> list[str]:
    """Return a doubt where the short fine-tuning, whose rate is fixed, broke the network."""
    found = []
    for name, before, after in (
        ("the probe", reading.probe, reading.fine_tuned),
        ("the own head", reading.head, reading.head_fine_tuned),
    ):
        if before is None or reading.reestimated is None:  # not read, or read once
            continue
        if after is None:
            found.append(f"fine-tuned with {name} it ends in NaN: there is no such reading")
        elif after.acc < before.acc - FELL:
            found.append(
                f"fine-tuned with {name} its accuracy falls from {100 * before.acc:.1f} to "
                f"{100 * after.acc:.1f} %: the ASR read after it says nothing of the backdoor"
            )
    return found


def without_labels(probe: LabeledImages, *, target: int | None = None) -> list[str]:
    """Return a doubt where classes have no image that probe and neighbours could know them by.

    Args:
        target: The one class that an attack's success is counted by, if it is.
    """
    absent = set(range(len(probe.classes))) - set(probe.labels.tolist())
    if not absent:
        return []
    doubt = (
        f"{len(absent)} of {len(probe.classes)} classes have none of the {len(probe.labels)} "
        "labeled images, so probe and neighbours never name them"
    )
    if target in absent:
        doubt += f", the target {target} too: their ASR is 0 whatever the network"
    return [doubt]


def not_taken(known: Known) -> list[str]:
    """Return a doubt where there was hardly a backdoor in the victim to begin with."""
    found = []
    all_to_all = known.attack.goal == "all-to-all"
    of_accuracy = known.victim_acc if all_to_all and known.victim_acc is not None else 1.0
    wanted = TOOK * of_accuracy
    if known.supervised and known.victim_asr is not None and known.victim_asr < wanted:
        found.append(
            f"the victim's own ASR was {100 * known.victim_asr:.1f} %, below {100 * wanted:.0f} %: "
            "the attack did not take"
        )
    if not known.supervised and known.victim_loss is not None and known.victim_loss < LOST:
        found.append(
            f"the victim lost {100 * known.victim_loss:.1f} points on triggered images, less than "
            f"{100 * LOST:.0f}: the attack did not take"
        )
    return found


def planted_elsewhere(known: Known, side: int) -> list[str]:
    """Return a doubt where a trigger was planted in images of another size than ``side``."""
    if known.side in (None, side):
        return []
    return [
        f"the trigger was planted in images of {known.side} pixels a side, and these have {side}: "
        "what it does to them says little about the backdoor"
    ]


def counts(split: Split) -> dict[str, int]:
    """Return how many images each role has."""
    return {
        "unlabeled": len(split.unlabeled),
        "probe": len(split.probe.labels),
        "test": len(split.test.labels),
    }


def reading_record(reading: Reading) -> dict[str, Any]:
    """Return scores as shares, as JSON can hold them."""
    return {
        name: None if scores is None else asdict(scores)
        for name, scores in reading._asdict().items()
    }


NAMES = {
    "head": "own head",
    "probe": "linear probe",
    "neighbours": "nearest neighbours",
    "reestimated": "probe, statistics re-estimated",
    "fine_tuned": "probe, fine-tuned on clean images",
    "head_reestimated": "own head, statistics re-estimated",
    "head_fine_tuned": "own head, fine-tuned on clean images",
}


def scores_table(reading: Reading, *, title: str = "Scores, percent") -> Table:
    """Return a reading in percent, one line a reader."""
    rows = [
        (NAMES[name], *percent(scores))
        for name, scores in reading._asdict().items()
        if scores is not None
    ]
    return Table(title, ("read by", "ACC", "ASR", "PA"), tuple(rows), decimals=1)


def percent(scores: Scores) -> tuple[float, float, float]:
    """Return ACC, ASR and PA in percent."""
    return 100 * scores.acc, 100 * scores.asr, 100 * scores.pa
