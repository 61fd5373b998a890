"""The paper's attacks by name, and attacks to and from records.

A new attack is one line in ``ATTACKS`` here, its printed name in ``bench.cells``, and, where it
trains otherwise than others, its part of ``settings.victim_preset``.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Literal

from unbackdoor import patterns
from unbackdoor.attacks.poisoning import PGD_EPSILON, PGD_STEPS, Attack
from unbackdoor.attacks.triggers import TRIGGERS, BadNets, Blend, Position, Sig, WaNet
from unbackdoor.errors import SettingsError, unknown
from unbackdoor.values import changed, made

Training = Literal["supervised", "simclr"]
NO_ATTACK = "this record holds no attack that is known here"
SMALL = 64  # pixels: up to here, patches and noise are those that the paper has at 32


def _patch(size: int, training: Training) -> BadNets:
    position: Position = "center" if training == "simclr" else "top-left"
    if size <= SMALL:
        return BadNets(position=position)
    return BadNets(size=32, cell=4, position=position)


def _noise(size: int) -> Blend:
    side = 32 if size <= SMALL else 224
    return Blend(height=side, width=side)


CLEAN_LABEL: Mapping[str, Any] = {"share": 0.6, "share_of": "target", "poisons": "target"}

# Each takes the side of the images and the kind of training.
ATTACKS: Mapping[str, Callable[[int, Training], Attack]] = {
    "badnets": lambda size, training: Attack(_patch(size, training)),
    "blend": lambda size, training: Attack(_noise(size)),
    "sig": lambda size, training: Attack(Sig()),
    "wanet": lambda size, training: Attack(WaNet(), noise=2.0, redrawn=training == "supervised"),
    "cla": lambda size, training: Attack(_patch(size, training), **CLEAN_LABEL, adversarial=True),
}


def is_adversarial(name: str) -> bool:
    """Tell whether the attack ``name`` needs a surrogate; what is no attack's name does not."""
    return name in ATTACKS and ATTACKS[name](SMALL, "supervised").adversarial


def named_attack(
    name: str,
    *,
    size: int,
    training: Training,
    options: Mapping[str, Any] | None = None,
    trigger: Mapping[str, str] | None = None,
) -> Attack:
    """Return the paper's attack ``name``, perhaps with other options.

    SimCLR's victims, and CLA's, are poisoned without touching a label: 60 % of the target class.

    Args:
        size: Side of the images in pixels.
        options: Attributes of :class:`Attack` to replace.
        trigger: Attributes of its trigger to replace, as texts.

    Raises:
        SettingsError: If there is no such attack or attribute, or a value is out of range.
    """
    if name not in ATTACKS:
        raise SettingsError(unknown("attack", name, ATTACKS))
    attack = ATTACKS[name](size, training)
    if training == "simclr":
        if is_adversarial(name):
            raise SettingsError(f"{name} needs labels and has no SimCLR form; badnets needs none")
        attack = replace(attack, **CLEAN_LABEL)
    if trigger:
        before: Any = attack.trigger
        where = type(before).__name__
        after = changed(before, trigger, where, texts=True, prefix="trigger.")
        attack = replace(attack, trigger=after)
    altered: Attack = changed(attack, options or {}, name)
    return altered


def attack_record(attack: Attack) -> dict[str, Any]:
    """Return ``attack`` as JSON can hold it."""
    record = {item.name: getattr(attack, item.name) for item in fields(attack)}
    names = {cls: name for name, cls in TRIGGERS.items()}
    trigger: Any = attack.trigger
    record["trigger"] = {"name": names[type(trigger)], **asdict(trigger)}
    if attack.adversarial:
        record["pgd"] = {"norm": "linf", "epsilon": PGD_EPSILON, "steps": PGD_STEPS}
    if isinstance(trigger, Blend):
        record["trigger"]["sha256"] = _digest(trigger)
    return record


def attack_from_record(record: Mapping[str, Any]) -> Attack:
    """Return the attack that :func:`attack_record` wrote; its name may stand beside it.

    Raises:
        SettingsError: If the record is of another kind, or this installation draws another pattern
            than the one that was planted.
    """
    try:
        values = {name: value for name, value in record.items() if name not in ("name", "pgd")}
        described = dict(record["trigger"])
        cls: Any = TRIGGERS[described.pop("name")]
        digest = described.pop("sha256", None) if cls is Blend else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SettingsError(f"{NO_ATTACK}: {error}") from error
    trigger = made(cls, described, NO_ATTACK)
    attack: Attack = made(Attack, {**values, "trigger": trigger}, NO_ATTACK)
    if digest is not None and digest != _digest(trigger):
        raise SettingsError(
            f"{trigger} has other pixels here than the victim was trained with; score it with the "
            "version of unbackdoor that its record names"
        )
    return attack


def _digest(trigger: Blend) -> str:
    pixels = patterns.gaussian_image(trigger.height, trigger.width, seed=trigger.seed)
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
