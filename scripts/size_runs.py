"""Size the paper's tables: victims, cells, and hours of a GPU, from the grids alone.

    python scripts/size_runs.py

Operations are counted, times are not measured: a step of training counts as three forward passes,
the gradient of an image as one, each view anew. Baselines are taken to cost what the paper's
method costs: ANP costs six times that, most others less. Detectors (Table 6) and projection heads
are left out.
"""

from pathlib import Path

import torch

from unbackdoor.backbones import build
from unbackdoor.bench.cells import CBD, NO_DEFENSE, Cell, Victim
from unbackdoor.bench.grid import entries, read_grid, settings_of
from unbackdoor.devices import flops
from unbackdoor.settings import purify_preset

ROOT = Path(__file__).resolve().parent.parent
GROUPS = (("1", "2", "7", "8"), ("3", "9", "10"), ("4",), ("5",))
TIERS = ("paper", "h200")
TRAINING = {"cifar10": 50_000, "imagenet100": 126_689}  # images
TEST = {"cifar10": 10_000, "imagenet100": 5_000}
SUSTAINED = 100e12  # operations a second: 30,000 images/s of ResNet-18 in training at 32 pixels
PRICE = 3.0  # dollars an hour
READINGS = 3  # of the test images' features: as delivered, re-estimated, fine-tuned


def forward_passes(victim: Victim) -> float:
    """Return how many images' forward passes the training of a victim costs."""
    if victim.settings is None:
        raise SystemExit(f"{victim.stem} comes with the package")
    images = victim.settings.limit or TRAINING[victim.data]
    views = 2 if victim.training == "simclr" else 1
    return victim.settings.epochs * images * views * 3.0


def passes_of_defense(cell: Cell) -> float:
    """Return the same of a defense."""
    if cell.defense == NO_DEFENSE:
        return 0.0
    preset = "imagenet100" if cell.victim.data == "imagenet100" else "cifar10"
    settings = settings_of(cell) if cell.defense == CBD else purify_preset(preset)
    images = cell.share * TRAINING[cell.victim.data]
    search = 2.0 * settings.search.steps + 1  # the anchor
    if settings.search.kind == "changes":
        learning = settings.changes.steps * settings.changes.group * settings.changes.count
        search = 2.0 * (1 + learning / images)  # a step at every batch, those before an epoch
    views = 2 + (settings.align > 0)
    return float(settings.epochs * images * (search + 3 * views + 1))  # 1: under the original


def sizes_table() -> str:
    """Return one row for each group of tables that share victims, and one for all, of each tier.

    A task is a victim with all of its cells.
    """
    lines = [
        "| tier | tables | victims | cells | GPU-hours: victims | defenses | scores | all "
        "| dollars | longest task, minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for tier in TIERS:
        rows = [_sizes(tier, tables) for tables in GROUPS]
        sums = [sum(column) for column in zip(*rows, strict=True)]
        sums[-1] = max(row[-1] for row in rows)
        named = zip((", ".join(tables) for tables in GROUPS), rows, strict=True)
        lines += [_row(tier, name, row) for name, row in (*named, ("all", sums))]
    return "\n".join(lines) + "\n"


def _sizes(tier: str, tables: tuple[str, ...]) -> list[float]:
    """Return the numbers of one row: victims, cells, four of hours, dollars, minutes."""
    cells: dict[str, Cell] = {}
    for table in tables:
        grid = read_grid(ROOT / f"grids/table{table}-{tier}.toml")
        cells |= {entry.cell.key: entry.cell for entry in entries(grid)}
    victims = {cell.victim.key: cell.victim for cell in cells.values()}
    one = next(iter(victims.values()))
    network = build(one.arch, classes=10).network.eval()
    size = one.size or 32
    an_hour = SUSTAINED * 3600 / flops(network, torch.zeros(1, 3, size, size))
    scores = 2 * READINGS * 2 * TEST[one.data] / an_hour
    training = {key: forward_passes(victim) / an_hour for key, victim in victims.items()}
    defenses = {key: passes_of_defense(cell) / an_hour for key, cell in cells.items()}
    tasks = dict(training)
    for key, cell in cells.items():
        tasks[cell.victim.key] += defenses[key] + scores
    hours = [sum(training.values()), sum(defenses.values()), len(cells) * scores]
    longest = 60 * max(tasks.values())
    return [len(victims), len(cells), *hours, sum(hours), PRICE * sum(hours), longest]


def _row(tier: str, tables: str, numbers: list[float]) -> str:
    victims, cells, *hours, dollars, longest = numbers
    shown = [f"{victims:.0f}", f"{cells:.0f}", *(f"{hour:.1f}" for hour in hours)]
    return f"| {tier} | {tables} | {' | '.join(shown)} | {dollars:.0f} | {longest:.0f} |"


if __name__ == "__main__":
    print(sizes_table(), end="")
