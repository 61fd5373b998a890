"""Score a checkpoint against the attack in a victim's record: ACC, ASR and PA, in percent.

    python scripts/score.py CHECKPOINT RECORD.json cifar10:DIR [--images 4000]

Prints the scores through the checkpoint's own head, and through a probe on 500 training images as
delivered, after re-estimation on 2,500 others, and after a clean fine-tuning on the 500.
"""

import argparse
import json
from pathlib import Path

import torch

from unbackdoor.attacks.triggers import TRIGGERS
from unbackdoor.backbones import open_backbone
from unbackdoor.data import load_labeled
from unbackdoor.metrics import Scores, durability, make_test_set, score

PROBE, PLAIN = 500, 2_500


def main() -> None:
    """Read, score, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("source")
    parser.add_argument("--images", type=int, default=4_000, help="take the first test images")
    parser.add_argument("--seed", type=int, default=5, help="draws the training images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    record = json.loads(arguments.record.read_text())
    train, test = (load_labeled(arguments.source, split=split) for split in ("train", "test"))
    attack = record["attack"]
    scored = make_test_set(
        test.images[: arguments.images],
        test.labels[: arguments.images],
        trigger=TRIGGERS[attack["trigger"]](**attack["options"]),
        target=attack["target"],
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    rows = torch.randperm(len(train.images), generator=generator)
    backbone = open_backbone(
        arguments.checkpoint, record["arch"], mean=record["mean"], std=record["std"]
    ).backbone
    probe, plain = rows[:PROBE], rows[PROBE : PROBE + PLAIN]
    readings = durability(
        backbone,
        train.images[probe],
        train.labels[probe],
        scored,
        classes=len(test.classes),
        plain=train.images[plain],
    )
    print(f"{len(scored.labels)} test images, {len(scored.triggered)} of them triggered")
    show("own head", score(backbone, backbone.heads[0], scored))
    for name, scores in readings._asdict().items():
        show(f"probe, {name}", scores)


def show(name: str, scores: Scores) -> None:
    """Print one line."""
    numbers = (f"{what} {100 * getattr(scores, what):.1f}" for what in ("acc", "asr", "pa"))
    print(f"{name:20}", *numbers)


if __name__ == "__main__":
    main()
