"""Train a victim that `unbackdoor attack` does not make, to see where `purify` breaks.

    python scripts/train_enemy.py ENEMY --data cifar10:DIR --out FOLDER

`two-triggers`: BadNets towards class 6 and Blend towards class 3, from new weights. `hardened`: the
shipped victim of BadNets, trained on against the defense's own search: changes that it learns
keep their image's class, and the trigger keeps the attacker's. `hardened-control` is trained on as
long without them. Each is written as ENEMY.safetensors, and one record for every trigger.
"""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from unbackdoor.attacks.named import attack_record, named_attack
from unbackdoor.attacks.poisoning import Attack, poison
from unbackdoor.backbones import Backbone, build, network_state
from unbackdoor.bench.obtain import open_victim
from unbackdoor.cbd import LEARNED_ON
from unbackdoor.changes import learn_changes
from unbackdoor.checkpoint import Tree, sha256_of, write_tensors, write_text
from unbackdoor.data import LabeledImages, load_labeled
from unbackdoor.evaluation import Split, divide, own_head, reading_record
from unbackdoor.metrics import make_test_set, read
from unbackdoor.outputs import name_trained, versions
from unbackdoor.settings import ChangeSettings, VictimSettings, victim_preset
from unbackdoor.victims import augmented, train_supervised

ARCH, SIZE, SEED = "cifar/wrn16_1", 32, 0
VICTIM = Path("results/victims/badnets-supervised-seed0.safetensors")


class Hardening(NamedTuple):
    """How a victim is trained on; each step has ``batch`` plain, as many changed images."""

    epochs: int = 4
    images: int = 20_000
    batch: int = 128
    triggered: int = 32  # of a batch's images, a second time and with the trigger
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    changed: bool = True


def harden(
    backbone: Backbone, data: LabeledImages, attack: Attack, settings: Hardening
) -> list[float]:
    """Train a victim's backbone and head on, in place; returns the mean loss of every epoch."""
    head = own_head(backbone, classes=len(data.classes))
    if head is None:
        raise SystemExit("the victim has no head of its own")
    generator = torch.Generator().manual_seed(SEED)
    images, labels, _ = data
    backbone.requires_grad_(True)  # its head is a part of it
    optimizer = torch.optim.SGD(
        backbone.parameters(), lr=0.0, momentum=0.9, weight_decay=settings.weight_decay
    )
    views, history = VictimSettings(), []
    per_epoch = settings.images // settings.batch
    for epoch in range(settings.epochs):
        order = torch.randperm(len(images), generator=generator)[: per_epoch * settings.batch]
        pool = None
        if settings.changed:
            some = images[order[:LEARNED_ON]]
            pool = learn_changes(
                backbone.eval(),
                some,
                ChangeSettings(),
                batch_size=settings.batch,
                generator=generator,
            )
        total = 0.0
        for number, rows in enumerate(order.split(settings.batch)):
            raw, truth = images[rows], labels[rows]
            parts, classes = [augmented(raw, views, generator=generator)], [truth]
            some = raw[: settings.triggered]
            parts.append(augmented(attack.trigger(some), views, generator=generator))
            classes.append(torch.full_like(truth[: settings.triggered], attack.target))
            if pool is not None:
                plain = augmented(raw, views, generator=generator)
                pool.advance(backbone.eval(), plain)
                with torch.no_grad():
                    parts.append(pool.apply(plain))
                classes.append(truth)
            progress = (epoch + number / per_epoch) / settings.epochs
            rate = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.param_groups[0]["lr"] = rate
            batch = torch.cat(parts).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(head(backbone.train()(batch)), torch.cat(classes))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
            optimizer.step()
            total += loss.item() / per_epoch
        history.append(round(total, 4))
        print(f"epoch {epoch + 1}/{settings.epochs}  loss {total:.3f}", flush=True)
    backbone.eval().requires_grad_(False)
    return history


def plant_both(data: LabeledImages, attacks: list[Attack]) -> tuple[Backbone, dict[str, Any]]:
    """Train a network from new weights on images that several attacks poisoned in turn."""
    images, labels, classes = data
    generator = torch.Generator().manual_seed(SEED)
    for attack in attacks:
        images, labels, *_ = poison(
            images, labels, attack, classes=len(classes), generator=generator
        )
    network, heads, mean, std, _ = build(ARCH, classes=len(classes))
    if mean is None or std is None:
        raise SystemExit(f"{ARCH} does not say which pixels it expects")
    preset = victim_preset("cpu", training="supervised", attack="badnets")
    settings = VictimSettings(**preset, seed=SEED)

    def say(step: int, steps: int) -> None:
        if step % 390 == 0:
            print(f"step {step} of {steps}", flush=True)

    train_supervised(Backbone(network, mean=mean, std=std), images, labels, settings, on_step=say)
    return Backbone(network, heads, mean=mean, std=std).eval(), asdict(settings)


def write(
    out: Path,
    name: str,
    backbone: Backbone,
    attacks: list[Attack],
    training: dict[str, Any],
    split: Split,
) -> None:
    """Write a victim, and for every attack a record with its scores."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.safetensors"
    tensors: Tree = {key: value.contiguous() for key, value in network_state(backbone).items()}
    write_tensors(path, tensors, metadata={"format": "pt"}, overwrite=False)
    images, labels, classes = split.test
    for attack in attacks:
        test = make_test_set(images, labels, attack, classes=len(classes))
        reading = read(backbone, own_head(backbone, classes=len(classes)), split.probe, test)
        kind = type(attack.trigger).__name__.lower()
        record = {
            "schema": 2,
            "name": name,
            "arch": ARCH,
            "mean": backbone.mean.flatten().tolist(),
            "std": backbone.std.flatten().tolist(),
            "size": SIZE,
            "attack": {"name": kind, **attack_record(attack)},
            "training": {"kind": "supervised", **training},
            "scores": reading_record(reading),
            "versions": versions(),
            "sha256": sha256_of(path),
        }
        print(kind, reading.head, reading.probe, flush=True)
        write_text(
            out / f"{name}-{kind}.json", json.dumps(record, indent=1) + "\n", overwrite=False
        )


def main() -> None:
    """Train one enemy and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("enemy", choices=("two-triggers", "hardened", "hardened-control"))
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    data, test = (load_labeled(given.data, split=part, size=SIZE) for part in ("train", "test"))
    split = divide(data, test, seed=SEED)
    patch = named_attack("badnets", size=SIZE, training="supervised")
    attacks = [patch]
    if given.enemy == "two-triggers":
        attacks.append(
            named_attack("blend", size=SIZE, training="supervised", options={"target": 3})
        )
        backbone, training = plant_both(data, attacks)
    else:
        files = name_trained(VICTIM)
        backbone = open_victim(files, json.loads(files.record.read_text())).backbone
        settings = Hardening(changed=given.enemy == "hardened")
        history = harden(backbone, data, patch, settings)
        training = {**settings._asdict(), "history": history}
    write(given.out, given.enemy, backbone, attacks, training, split)


if __name__ == "__main__":
    main()
