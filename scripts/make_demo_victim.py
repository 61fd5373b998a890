"""Train the victim that `unbackdoor demo` repairs, and write it with its record.

    python scripts/make_demo_victim.py DIR [--seed 0] [--epochs 8] [--out unbackdoor/assets]

DIR holds Fashion-MNIST's four idx files (Debian's package dataset-fashion-mnist). The victim is
trained on all 60,000 training images, none of which the demo uses. One thread and one seed give one
file: on another processor the last digits may differ. Takes about 12 minutes on one core.
"""

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from unbackdoor.attacks.poisoning import Attack, poison
from unbackdoor.attacks.triggers import BadNets
from unbackdoor.backbones import Backbone, build, network_state
from unbackdoor.checkpoint import sha256_of
from unbackdoor.data import load_labeled
from unbackdoor.metrics import make_test_set, score
from unbackdoor.settings import SupervisedSettings
from unbackdoor.victims import train_supervised

# Every victim that was trained while the demo was made; ACC, ASR and PA as in "scores".
TRIED = [
    {"seed": 100, "epochs": 6, "acc": 0.9188, "asr": 0.9984, "pa": 0.0016, "role": "settings"},
    {"seed": 101, "epochs": 8, "acc": 0.9222, "asr": 1.0, "pa": 0.0, "role": "settings"},
    {"seed": 0, "epochs": 8, "acc": 0.9206, "asr": 1.0, "pa": 0.0, "role": "this one"},
]
MEAN, STD = (0.286,) * 3, (0.353,) * 3  # of Fashion-MNIST's training images


def main() -> None:
    """Poison, train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="with Fashion-MNIST's four idx files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("unbackdoor/assets"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order give other last digits

    source = f"fashion-mnist:{arguments.folder}"
    train, test = (load_labeled(source, split=split) for split in ("train", "test"))
    attack = Attack(BadNets())
    generator = torch.Generator().manual_seed(arguments.seed)
    poisoned = poison(train.images, train.labels, attack, generator=generator)
    architecture = build("cifar/wrn16_1")
    classifier = Backbone(architecture.network, mean=MEAN, std=STD)  # heads left in: logits
    settings = SupervisedSettings(epochs=arguments.epochs, seed=arguments.seed)
    train_supervised(
        classifier,
        poisoned.images,
        poisoned.labels,
        settings,
        on_epoch=lambda epoch, loss: print(f"epoch {epoch}/{settings.epochs}  loss {loss:.3f}"),
    )
    backbone = Backbone(architecture.network, architecture.heads, mean=MEAN, std=STD).eval()
    unseen = slice(5_000, None)  # the first 5,000 test images are the demo's
    scored = make_test_set(
        test.images[unseen], test.labels[unseen], trigger=attack.trigger, target=attack.target
    )
    path = arguments.out / "demo_victim.safetensors"
    save_file({key: value.contiguous() for key, value in network_state(backbone).items()}, path)
    record = {
        "arch": "cifar/wrn16_1",
        "mean": MEAN,
        "std": STD,
        "sha256": sha256_of(path),
        "attack": {
            "trigger": "badnets",
            "options": asdict(attack.trigger),
            "target": attack.target,
            "share": attack.share,
            "poisoned_rows": int(poisoned.is_poisoned.sum()),
            "share_of_target_class": round(
                int(poisoned.is_poisoned.sum()) / int((poisoned.labels == attack.target).sum()), 4
            ),
        },
        "training": asdict(settings),
        "data": "Fashion-MNIST, 60,000 training images; scores on the last 5,000 test images",
        "scores": asdict(score(backbone, backbone.heads[0], scored)),
        "device": "cpu, 1 thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "tried": TRIED,
    }
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["scores"]))


if __name__ == "__main__":
    main()
