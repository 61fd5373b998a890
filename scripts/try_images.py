"""Repair victims with fewer, other or partly triggered images, and score what comes out.

    python scripts/try_images.py --data cifar10:DIR --other FILE [--victims FOLDER] [--only NAME]

The defaults of `purify` on the victims of this repository, scored on the test images; no setting is
chosen. FILE holds photographs of other things, such as samples of ImageNet. Appends a line to
`results/images.jsonl` for every victim and set of images that it does not hold yet.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from unbackdoor.attacks.poisoning import Attack
from unbackdoor.backbones import Backbone
from unbackdoor.bench.obtain import open_victim
from unbackdoor.cbd import purify
from unbackdoor.data import from_tensor, load_images
from unbackdoor.evaluation import Split, find_attack, load_split, own_head, reading_record
from unbackdoor.metrics import make_test_set, read
from unbackdoor.outputs import name_trained, versions
from unbackdoor.settings import PurifySettings
from unbackdoor.types import RawImages
from unbackdoor.values import flatten

TRIGGERED = 0.05
OTHERS = 1_000
KEY = ("victim", "images", "sha256", "settings")


class Trial(NamedTuple):
    """A set of images to repair with, and the settings."""

    name: str
    images: RawImages
    settings: PurifySettings

    @property
    def key(self) -> dict[str, Any]:
        """Of everything above, as JSON can hold it."""
        return {
            "images": self.name,
            "sha256": from_tensor(self.images).fingerprint,
            "settings": dict(flatten(asdict(self.settings))),
        }


def trials(split: Split, other: str, attack: Attack, *, size: int) -> list[Trial]:
    """Return what is tried; small sets also longer, triggered images also trimmed."""
    own, usual = split.unlabeled, PurifySettings()
    longer = replace(usual, epochs=3 * usual.epochs)
    count = round(TRIGGERED * len(own))
    fashion = load_images("fashion-mnist", size=size, limit=len(own))
    others = load_images(other, size=size, limit=OTHERS)
    triggered = torch.cat([attack.trigger(own[:count]), own[count:]])
    return [
        *(Trial(f"{few} images", own[:few], s) for few in (500, 250) for s in (usual, longer)),
        *(
            Trial(f"{TRIGGERED:.0%} of them triggered", triggered, s)
            for s in (usual, replace(usual, trim=3.0))
        ),
        Trial(f"{OTHERS:,} images of {Path(other).name}", others.read(range(OTHERS)), usual),
        Trial("Fashion-MNIST", fashion.read(range(len(own))), usual),
    ]


def main() -> None:
    """Repair every victim with every set that has no line yet, and append to the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--other", required=True, help="a folder or parquet file of images")
    parser.add_argument("--victims", type=Path, default=Path("results/victims"))
    parser.add_argument("--only", default="*", help="a pattern of victims' names")
    parser.add_argument("--sets", default="*", help="a pattern of sets' names")
    parser.add_argument("--out", type=Path, default=Path("results/images.jsonl"))
    given = parser.parse_args()
    done = given.out.read_text().splitlines() if given.out.exists() else []
    there = [{name: line[name] for name in KEY} for line in map(json.loads, done)]
    for path in sorted(given.victims.glob(f"{given.only}-supervised-seed0.json")):
        made = json.loads(path.read_text())
        if made["attack"] is None:
            continue
        size, seed = made["size"], made["training"]["seed"]
        victim = open_victim(name_trained(path.with_suffix(".safetensors")), made).backbone
        split = load_split(given.data, size=size, seed=seed)
        attack = find_attack(str(path), size=size).attack
        test = make_test_set(*split.test[:2], attack, classes=len(split.test.classes))
        for trial in trials(split, given.other, attack, size=size):
            key = {"victim": path.stem, **trial.key}
            if key in there or not fnmatch(trial.name, given.sets):
                continue
            started = time.monotonic()
            repaired, _ = purify(victim, trial.images, trial.settings)
            seconds = time.monotonic() - started
            network = cast(Backbone, repaired).to(memory_format=torch.channels_last)
            head = own_head(network, classes=len(split.test.classes))
            reading = read(network, head, split.probe, test, plain=split.unlabeled)
            line: dict[str, Any] = {
                **key,
                "scores": reading_record(reading),
                "seconds": round(seconds, 1),
                "threads": torch.get_num_threads(),
                "versions": versions(),
            }
            with given.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            what = f"{path.stem}, {trial.name}, {trial.settings.epochs} epochs"
            print(what, reading.head, reading.probe, flush=True)


if __name__ == "__main__":
    main()
