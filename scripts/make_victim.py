"""Train a WRN-16-1 with a BadNets backdoor, and write it with its record.

    python scripts/make_victim.py SOURCE OUT.safetensors [--seed 0] [--epochs 8]

SOURCE is `fashion-mnist:DIR` (the four idx files, Debian's package dataset-fashion-mnist) or
`cifar10:DIR`. All training images are used; scores are on the last 5,000 test images, so that the
demo's, which are the first, stay unseen. One thread and one seed give one file; on another
processor the last digits may differ. The demo's victim is

    python scripts/make_victim.py fashion-mnist:DIR unbackdoor/assets/demo_victim.safetensors

and takes about 12 minutes on one core.
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
from unbackdoor.backbones import CIFAR10_MEAN, CIFAR10_STD, Backbone, build, network_state
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
PIXELS = {  # mean and standard deviation of the training images
    "fashion-mnist": ((0.286,) * 3, (0.353,) * 3),
    "cifar10": (CIFAR10_MEAN, CIFAR10_STD),
}


def main() -> None:
    """Poison, train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="fashion-mnist:DIR or cifar10:DIR")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order give other last digits

    name = arguments.source.partition(":")[0]
    mean, std = PIXELS[name]
    train, test = (load_labeled(arguments.source, split=split) for split in ("train", "test"))
    attack = Attack(BadNets())
    generator = torch.Generator().manual_seed(arguments.seed)
    poisoned = poison(train.images, train.labels, attack, generator=generator)
    architecture = build("cifar/wrn16_1")
    classifier = Backbone(architecture.network, mean=mean, std=std)  # heads left in: logits
    settings = SupervisedSettings(epochs=arguments.epochs, seed=arguments.seed)
    train_supervised(
        classifier,
        poisoned.images,
        poisoned.labels,
        settings,
        on_epoch=lambda epoch, loss: print(f"epoch {epoch}/{settings.epochs}  loss {loss:.3f}"),
    )
    backbone = Backbone(architecture.network, architecture.heads, mean=mean, std=std).eval()
    unseen = slice(5_000, None)
    scored = make_test_set(
        test.images[unseen], test.labels[unseen], trigger=attack.trigger, target=attack.target
    )
    path = arguments.out
    save_file({key: value.contiguous() for key, value in network_state(backbone).items()}, path)
    record = {
        "arch": "cifar/wrn16_1",
        "mean": mean,
        "std": std,
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
        "data": f"{name}: {len(train.images)} training images, scores on the last 5,000 test ones",
        "scores": asdict(score(backbone, backbone.heads[0], scored)),
        "device": "cpu, 1 thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "tried": TRIED if name == "fashion-mnist" else [],
    }
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["scores"]))


if __name__ == "__main__":
    main()
