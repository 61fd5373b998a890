"""Score what ANP's masks would give at other thresholds: what an oracle would pick.

    python scripts/anp_thresholds.py --data cifar10:DIR [--results FOLDER]

Takes the masks from the records of the grid `defenses-cpu`. Every multiple of .05 is scored through
the victim's own head on test images, as the authors' `prune_neuron_cifar.py` does. The oracle picks
the lowest attack success among those that lose at most a tenth of the accuracy, as BackdoorBench
does; no defender could. Writes `results/anp-thresholds.json`.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unbackdoor.backbones import Backbone
from unbackdoor.bench.grid import entries, read_grid
from unbackdoor.bench.obtain import Found, open_victim
from unbackdoor.bench.store import open_store, read_records
from unbackdoor.defenses.anp import prune_by_masks
from unbackdoor.defenses.common import Split, copy_of
from unbackdoor.defenses.settings import AnpSettings
from unbackdoor.evaluation import find_attack, load_split, own_head, reading_record
from unbackdoor.metrics import make_test_set, read, score

GRID = Path("grids/defenses-cpu.toml")
VICTIM = Path("results/victims/badnets-supervised-seed0.json")
THRESHOLDS = [round(0.05 * step, 2) for step in range(20)]
LOST = 0.1  # of the accuracy


def main() -> None:
    """Score all thresholds of every record that has masks, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--results", type=Path, default=Path("results/bench"))
    parser.add_argument("--out", type=Path, default=Path("results/anp-thresholds.json"))
    given = parser.parse_args()
    made = json.loads(VICTIM.read_text())
    victim = open_victim(Found(VICTIM.with_suffix(".safetensors"), VICTIM), made).backbone
    split = load_split(given.data, size=made["size"], seed=0)
    images, labels, classes = split.test
    attack = find_attack(str(VICTIM), size=made["size"]).attack
    test = make_test_set(images, labels, attack, classes=len(classes))
    few = Split(*split.probe[:2], *split.probe[:2])  # only looked at for the log

    def head_scores(network: Backbone) -> dict[str, float]:
        scores = score(network, {"head": network.heads[0]}, test)["head"]
        return {"acc": scores.acc, "asr": scores.asr, "pa": scores.pa}

    def pruned(masks: dict[str, torch.Tensor], threshold: float) -> tuple[Backbone, int]:
        network = copy_of(victim, "cpu")
        log = prune_by_masks(network, masks, few, replace(AnpSettings(), threshold=threshold))
        return network, sum(map(len, log["pruned"].values()))

    found: dict[str, Any] = {}
    before = head_scores(victim)
    rows_of = {entry.cell.key: entry.row for entry in entries(read_grid(GRID))}
    for key, record in read_records(open_store(given.results), rows_of).items():
        if record["cell"]["defense"] != "anp":
            continue
        masks = {name: torch.tensor(mask) for name, mask in record["log"]["masks"].items()}
        rows: list[dict[str, float]] = []
        for threshold in THRESHOLDS:
            network, count = pruned(masks, threshold)
            row = {"threshold": threshold, "pruned": count}
            same = rows and rows[-1]["pruned"] == count  # a lower threshold prunes no others
            rows.append({**rows[-1], **row} if same else {**row, **head_scores(network)})
            print(rows_of[key], rows[-1], flush=True)
        good = [row for row in rows if row["acc"] >= (1 - LOST) * before["acc"]]
        picked = min(good, key=lambda row: row["asr"])["threshold"]
        network, _ = pruned(masks, picked)
        head = own_head(network, classes=len(classes))
        reading = read(network, head, split.probe, test, plain=split.unlabeled)
        found[rows_of[key]] = {
            "thresholds": rows,
            "picked": picked,
            "scores": reading_record(reading),
        }
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
