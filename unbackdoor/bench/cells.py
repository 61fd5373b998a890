"""What is run: a victim, and a cell of a table; each with a key of its own. No torch."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from unbackdoor.settings import DetectionSettings, LabelKind, VictimSettings

CLEAN = "clean"
NO_DEFENSE = "none"
CONTRASTIVE = "contrastive"  # the paper's "SFT": no pull term
CBD = "cbd"  # the method of this package, inside tables
DEMO = "demo"  # the victim that comes with the package
LATER = ("code", "detection", "planted", "start")  # no part of a key where there is none

Pairs = tuple[tuple[str, Any], ...]

ATTACK_NAMES = {  # as the paper prints them
    "badnets": "BadNets",
    "blend": "Blend",
    "sig": "SIG",
    "wanet": "WaNet",
    "cla": "CLA",
}


@dataclass(frozen=True)
class Victim:
    """A backbone before any defense.

    Attributes:
        attack: What it was poisoned by; ``clean`` is never poisoned.
        training: With labels, or by SimCLR.
        arch: See ``build``.
        data: Name of the images, without the place where they are.
        size: Side of the images in pixels; 0 is the architecture's.
        target: The attacker's class.
        seed: Of its training.
        settings: Of its training; ``None`` for one that comes with the package.
        start: SHA-256 of the checkpoint that it was trained on from, where there is one.
        planted: What differs from the attack's own options, see :class:`Cell`.
    """

    attack: str
    training: Literal["supervised", "simclr"]
    arch: str
    data: str
    size: int
    target: int
    seed: int
    settings: VictimSettings | None
    start: str = ""
    planted: Pairs = ()

    @property
    def key(self) -> str:
        """Of everything above."""
        return key_of(_victim_record(self))

    @property
    def name(self) -> str:
        """Its attack and what differs from it."""
        return f"{self.attack}{in_words(self.planted)}"

    @property
    def stem(self) -> str:
        """What the names of its files begin with."""
        return f"{self.attack}-{self.training}-seed{self.seed}"


@dataclass(frozen=True)
class Detection:
    """A detector that is trained on what a defense leaves of a backbone, and scored.

    Attributes:
        data: Name of the folder in VOC's layout, without the place where it is.
        train: The set to train on.
        test: The set to score on.
        stages: See ``find_levels``; none are the network's own.
        settings: Of its training; the seed is the cell's.
    """

    data: str
    train: str
    test: str
    stages: tuple[str, ...]
    settings: DetectionSettings


@dataclass(frozen=True)
class Cell:
    """One defense of one victim, scored under one attack.

    It holds all that decides the result and nothing that names it, so that tables share cells.

    Attributes:
        victim: See :class:`Victim`; tables share these as well.
        attack: What the backbone is scored under: the victim's own attack, or, for a clean victim,
            any.
        defense: ``none``, ``cbd``, a name in ``DEFENSES``, or ``file.py:function``, no folder.
        settings: All of the defense's as sorted pairs of a dotted name and a value; without
            ``changes.*`` where no changes are learned, ``trim`` where nothing is trimmed, BCU's
            ``spread`` where it is PyTorch's and Fine-Pruning's ``most`` where it is 1, as cells
            were before these settings.
        labels: What the defense is told beside the images.
        share: Of the training images, that the defense has.
        seed: Of the split and of the defense.
        detection: The detector that follows; ``None`` for the scores of the backbone alone.
        code: SHA-256 of the file that holds the defense, where a file does.
        planted: What differs from the options that ``attack`` has by itself (attributes of
            ``Attack``), as sorted pairs of a dotted name, such as ``trigger.size``, and a value.
    """

    victim: Victim
    attack: str
    defense: str
    settings: Pairs
    labels: LabelKind
    share: float
    seed: int
    detection: Detection | None = None
    code: str = ""
    planted: Pairs = ()

    @property
    def key(self) -> str:
        """Of everything above."""
        return key_of(as_record(self))


def as_record(cell: Cell) -> dict[str, Any]:
    """Return all that makes the key of a cell; what it has none of is not mentioned."""
    return _mentioned(asdict(cell) | {"victim": _victim_record(cell.victim)})


def _victim_record(victim: Victim) -> dict[str, Any]:
    return _mentioned(asdict(victim))


def _mentioned(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value or name not in LATER}


def in_words(planted: Pairs) -> str:
    """Return what stands behind the name of an attack: what differs from its own options."""
    return f" ({', '.join(f'{name} {value}' for name, value in planted)})" if planted else ""


def key_of(value: Any) -> str:
    """Return the first 20 hexadecimal digits of the SHA-256 of ``value`` as sorted JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def describe(cell: Cell) -> str:
    """Return one line about a cell."""
    victim = cell.victim
    attack = f"{cell.attack}{in_words(cell.planted)}"
    name = victim.name if victim.attack != CLEAN else f"clean under {attack}"
    labels = "" if cell.labels == "none" else f", {cell.labels} labels"
    detector = "" if cell.detection is None else f", a detector on {cell.detection.data}"
    return (
        f"{name} {victim.training} {victim.arch}, {cell.defense}{labels}{detector}, "
        f"seed {cell.seed}"
    )
