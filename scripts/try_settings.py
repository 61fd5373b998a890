"""Try settings of `purify` on development victims, and score them on validation rows.

    python scripts/try_settings.py --data cifar10:DIR [--victims FOLDER] [--set NAME=VALUE ...]

Appends a line to `results/development/trials.jsonl` for every victim in the folder: all settings,
scores before and after, seconds. Victims of seeds below 100 are refused:
tables report those, and nothing may be chosen on them.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from unbackdoor.bench.obtain import open_victim
from unbackdoor.cbd import purify
from unbackdoor.data import load_labeled
from unbackdoor.devices import pick_precision
from unbackdoor.evaluation import divide, find_attack, own_head, reading_record
from unbackdoor.metrics import make_test_set, read
from unbackdoor.outputs import name_trained, versions
from unbackdoor.settings import PRESETS, PurifySettings, purify_preset
from unbackdoor.values import flatten, settings_from

FIRST_SEED = 100


def main() -> None:
    """Purify every development victim, score it before and after, append to the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--victims", type=Path, default=Path("results/development"))
    parser.add_argument("--only", default="*", help="a pattern of victims' names")
    parser.add_argument("--out", type=Path, default=Path("results/development/trials.jsonl"))
    parser.add_argument("--preset", choices=tuple(PRESETS), default="default")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--limit", type=int, default=2_500, help="unlabeled images")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    settings = settings_from(purify_preset(given.preset), given.set)
    defaults = dict(flatten(asdict(PurifySettings())))
    differs = {k: v for k, v in flatten(asdict(settings)) if v != defaults[k]}
    for path in sorted(given.victims.glob(f"{given.only}-supervised-seed*.json")):
        made = json.loads(path.read_text())
        if made["training"]["seed"] < FIRST_SEED:
            raise SystemExit(f"{path}: settings are chosen on seeds from {FIRST_SEED} on")
        size = made["size"]
        victim = open_victim(name_trained(path.with_suffix(".safetensors")), made).backbone
        parts = [load_labeled(given.data, split=part, size=size) for part in ("train", "test")]
        split = divide(*parts, seed=made["training"]["seed"])
        if split.validation is None:
            raise SystemExit(f"{given.data}: has no validation rows")
        images, labels, classes = split.validation
        test = make_test_set(
            images, labels, find_attack(str(path), size=size).attack, classes=len(classes)
        )
        precision = pick_precision(given.precision, torch.device("cpu"))
        started = time.monotonic()
        purified, history = purify(
            victim, split.unlabeled[: given.limit], settings, precision=precision
        )
        seconds = time.monotonic() - started
        scores = {}
        for name, backbone in (("before", victim), ("after", purified)):
            network = backbone.to(memory_format=torch.channels_last)
            reading = read(
                network,
                own_head(network, classes=len(classes)),
                split.probe,
                test,
                plain=split.unlabeled,
            )
            scores[name] = reading_record(reading)
        line = {
            "victim": path.stem,
            "settings": dict(flatten(asdict(settings))),
            "images": given.limit,
            "scores": scores,
            "losses": [[round(h.pull, 4), round(h.distill, 4)] for h in history],
            "seconds": round(seconds, 1),
            "precision": precision,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        with given.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        words = [f"{path.stem} {differs}"]
        for name in ("head", "probe", "reestimated", "fine_tuned"):
            values = scores["after"][name]
            if values is None:  # no head, or a fine-tuning that ended in NaN
                continue
            words.append(
                f"{name} " + " / ".join(f"{100 * values[k]:.1f}" for k in ("acc", "asr", "pa"))
            )
        print(" | ".join(words), flush=True)


if __name__ == "__main__":
    main()
