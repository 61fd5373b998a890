"""Re-estimate statistics on the defender's images, and on images that no defense has, and score.

    python scripts/compare_reestimation.py --data cifar10:DIR [--only NAME] [--seed 0]

The records' reading "re-estimated" uses the unlabeled images, which a defense without labels had as
well. This repairs victims of this repository by the defaults of `purify`, scores victim and repair
both ways, and appends a line for each to `results/reestimation.jsonl`.
"""

import argparse
import json
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from torch import nn

from unbackdoor.backbones import Backbone
from unbackdoor.bench.obtain import open_victim
from unbackdoor.cbd import purify
from unbackdoor.evaluation import Split, find_attack, load_split, own_head
from unbackdoor.metrics import TestSet, extract, linear_probe, make_test_set, reestimated, score
from unbackdoor.outputs import name_trained, versions
from unbackdoor.settings import PurifySettings

ROOT = Path(__file__).resolve().parent.parent


def read_both(backbone: Backbone, split: Split, test: TestSet) -> dict[str, Any]:
    """Return ACC, ASR and PA by probe and own head, re-estimated on either images."""
    found = {}
    classes = len(split.test.classes)
    for name, images in (("unlabeled", split.unlabeled), ("validation", split.validation.images)):
        renewed = reestimated(backbone, images)
        features = extract(renewed, split.probe.images)
        probe = linear_probe(features, split.probe.labels, classes=classes)
        readers = {"probe": probe, "head": cast("nn.Module", own_head(backbone, classes=classes))}
        scores = score(renewed, readers, test)
        found[name] = {reader: asdict(scores[reader]) for reader in readers}
    return found


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", default="*")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    split = load_split(args.data, size=32, seed=args.seed)
    for path in sorted((ROOT / "results/victims").glob("*-supervised-seed0.safetensors")):
        files = name_trained(path)
        made = json.loads(files.record.read_text())
        if made["attack"] is None or not fnmatch(path.name, args.only):
            continue
        attack = find_attack(str(files.record), size=32).attack
        test = make_test_set(*split.test[:2], attack, classes=len(split.test.classes))
        victim = open_victim(files, made).backbone
        repaired = purify(victim, split.unlabeled, PurifySettings(seed=args.seed)).backbone
        for name, backbone in (("victim", victim), ("purified", cast("Backbone", repaired))):
            line = {
                "victim": path.stem,
                "backbone": name,
                "seed": args.seed,
                "scores": read_both(backbone, split, test),
                "versions": versions(),
            }
            with (ROOT / "results/reestimation.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(path.stem, name, line["scores"])


if __name__ == "__main__":
    main()
