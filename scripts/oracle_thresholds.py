"""Score ANP and CLP at every threshold: what an oracle would pick, and no defender could.

    python scripts/oracle_thresholds.py --data cifar10:DIR [--only anp|clp]

ANP's masks are those in the records of the grid `defenses-cpu`, its thresholds all multiples of .05
as in the authors' `prune_neuron_cifar.py`; CLP's are 0 to 10 standard deviations in steps of .5, as
BackdoorBench has them. Each is scored through the victim's own head on test images. The oracle
picks the lowest attack success among those that lose at most a tenth of the accuracy, as
BackdoorBench does. Writes `results/oracle-thresholds.json`, where `--only` leaves the rest.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unbackdoor.backbones import Backbone
from unbackdoor.bench.grid import entries, read_grid
from unbackdoor.bench.obtain import open_victim
from unbackdoor.bench.store import look_at, read_records
from unbackdoor.defenses.anp import prune_by_masks
from unbackdoor.defenses.clp import prune_by_lipschitz
from unbackdoor.defenses.common import DefenseData, Split, copy_of
from unbackdoor.defenses.settings import AnpSettings, ClpSettings
from unbackdoor.evaluation import find_attack, load_split, own_head, reading_record
from unbackdoor.metrics import make_test_set, read, score
from unbackdoor.outputs import name_trained

GRID = Path("grids/defenses-cpu.toml")
RECORDS = Path("results/bench")
VICTIM = Path("results/victims/badnets-supervised-seed0.json")
LOST = 0.1  # of the accuracy

Prune = Callable[[float], tuple[Backbone, int]]  # by a threshold; the network and what is pruned


def anp_prunings(victim: Backbone, few: Split) -> Iterable[tuple[str, Prune, list[float]]]:
    """Yield every row of the grid that has masks, how it prunes and its thresholds, rising.

    Args:
        few: Labeled images, only looked at for the log.
    """
    found = [entry for entry in entries(read_grid(GRID)) if entry.cell.defense == "anp"]
    records = read_records(look_at(RECORDS), [entry.cell.key for entry in found])
    for entry in found:
        if entry.cell.key not in records:
            continue
        log = records[entry.cell.key]["log"]
        masks = {name: torch.tensor(mask) for name, mask in log["masks"].items()}

        def prune(threshold: float, masks: Any = masks) -> tuple[Backbone, int]:
            network = copy_of(victim, "cpu")
            settings = replace(AnpSettings(), threshold=threshold)
            pruned = prune_by_masks(network, masks, few, settings)["pruned"]
            return network, sum(map(len, pruned.values()))

        yield entry.row, prune, [round(0.05 * step, 2) for step in range(20)]


def clp_prunings(victim: Backbone, few: Split) -> Iterable[tuple[str, Prune, list[float]]]:
    """Yield how CLP prunes and its thresholds, of which a lower one prunes more."""

    def prune(deviations: float) -> tuple[Backbone, int]:
        data = DefenseData(few.images)
        result = prune_by_lipschitz(victim, data, ClpSettings(deviations=deviations))
        return result.backbone, sum(map(len, result.log["pruned"].values()))

    yield "CLP", prune, [0.5 * step for step in range(21)]


PRUNINGS = {"anp": anp_prunings, "clp": clp_prunings}


def main() -> None:
    """Score all thresholds, pick as an oracle would, and write both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", choices=tuple(PRUNINGS))
    parser.add_argument("--out", type=Path, default=Path("results/oracle-thresholds.json"))
    given = parser.parse_args()
    made = json.loads(VICTIM.read_text())
    victim = open_victim(name_trained(VICTIM.with_suffix(".safetensors")), made).backbone
    split = load_split(given.data, size=made["size"], seed=0)
    images, labels, classes = split.test
    attack = find_attack(str(VICTIM), size=made["size"]).attack
    test = make_test_set(images, labels, attack, classes=len(classes))
    few = Split(*split.probe[:2], *split.probe[:2])

    def head_scores(network: Backbone) -> dict[str, float]:
        scores = score(network, {"head": network.heads[0]}, test)["head"]
        return {"acc": scores.acc, "asr": scores.asr, "pa": scores.pa}

    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    before = head_scores(victim)
    for defense, prunings in PRUNINGS.items():
        if given.only not in (None, defense):
            continue
        found[defense] = {}
        for row, prune, thresholds in prunings(victim, few):
            rows: list[dict[str, float]] = []
            for threshold in thresholds:
                network, count = prune(threshold)
                now = {"threshold": threshold, "pruned": count}
                same = rows and rows[-1]["pruned"] == count  # then they are the same neurons
                rows.append({**rows[-1], **now} if same else {**now, **head_scores(network)})
                print(row, rows[-1], flush=True)
            good = [scores for scores in rows if scores["acc"] >= (1 - LOST) * before["acc"]]
            picked = min(good, key=lambda scores: scores["asr"])["threshold"]
            network, _ = prune(picked)
            head = own_head(network, classes=len(classes))
            reading = read(network, head, split.probe, test, plain=split.unlabeled)
            found[defense][row] = {
                "thresholds": rows,
                "picked": picked,
                "scores": reading_record(reading),
            }
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
