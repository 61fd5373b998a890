"""Write the tables of the documentation from `results/`, or check that they are current.

    python scripts/tables.py [--check]

Each record in `results/demo/` is the `scores.json` of one `unbackdoor demo --seed SEED`; the table
has medians; those in `results/victims/` were written by `unbackdoor attack`; those in
`results/bench/` by `unbackdoor bench run`; `results/searches.json` by
`scripts/compare_searches.py`.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from unbackdoor.bench.cells import NO_DEFENSE
from unbackdoor.bench.grid import entries, read_grid
from unbackdoor.bench.store import look_at, read_records
from unbackdoor.defenses import DEFENSES

ROOT = Path(__file__).resolve().parent.parent
DEMO_ROWS = {
    "victim": "victim",
    "fine_tuned": "fine-tuned, 500 labels",
    "purified": "**purified, no labels**",
}
WHAT = ("acc", "asr", "pa")


def demo_table(records: list[dict[str, Any]]) -> str:
    """Return the medians of the demo's records, in percent."""

    def median(row: str, *, reading: str, what: str) -> str:
        values = [record["scores"][row][reading][what] for record in records]
        return f"{100 * statistics.median(values):.1f}"

    lines = [
        "| backbone | probe: ACC | ASR | PA | ASR, statistics re-estimated | ASR, fine-tuned clean "
        "| own head: ACC | ASR | PA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, name in DEMO_ROWS.items():
        cells = [
            *(median(row, reading="probe", what=what) for what in WHAT),
            *(median(row, reading=when, what="asr") for when in ("reestimated", "fine_tuned")),
            *(median(row, reading="head", what=what) for what in WHAT),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def victims_table(records: list[dict[str, Any]]) -> str:
    """Return the scores of every victim, and of the clean one under every attack, in percent."""
    lines = [
        "| victim | attack | training | epochs, images | own head: ACC | ASR | PA "
        "| probe: ACC | ASR | PA |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        clean = record["attack"] is None
        readings = record["scores"] if clean else {record["attack"]["name"]: record["scores"]}
        training = record["training"]
        for attack, scores in readings.items():
            cells = [
                "clean" if clean else f"seed {training['seed']}",
                attack,
                training["kind"],
                f"{training['epochs']}, {record['data']['images']:,}",
            ]
            for reading in ("head", "probe"):
                read = scores[reading] or dict.fromkeys(WHAT)
                cells += ["–" if read[w] is None else f"{100 * read[w]:.1f}" for w in WHAT]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def defense_table(defense: str) -> str:
    """Return what a defense did to the victim of `grids/defenses-cpu.toml`, in percent."""
    readings = {
        "head": "own head",
        "probe": "probe",
        "reestimated": "probe, re-estimated",
        "fine_tuned": "probe, fine-tuned",
    }
    lines = [f"| | {' | '.join(readings.values())} |", "|---|---|---|---|---|"]
    for name, record in defense_records():
        if record["cell"]["defense"] not in (NO_DEFENSE, defense):
            continue
        scores = record["scores"]["after"]
        cells = [" / ".join(f"{100 * scores[r][w]:.1f}" for w in WHAT) for r in readings]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@cache
def defense_records() -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of `grids/defenses-cpu.toml` that have a record, by name."""
    found = entries(read_grid(ROOT / "grids/defenses-cpu.toml"))
    records = read_records(look_at(ROOT / "results/bench"), [entry.cell.key for entry in found])
    return [
        (entry.row, dict(records[entry.cell.key])) for entry in found if entry.cell.key in records
    ]


def searches_table() -> str:
    """Return how often each search finds the attacker's class, and how concentrated it is."""
    path = ROOT / "results/searches.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    names = [name.partition("-")[0] for name in found]
    lines = [f"| search | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    for search in next(iter(found.values()), {}):
        cells = []
        for rows in found.values():
            mean, strongest = rows[search]["mean"], rows[search]["strongest"]
            numbers = (mean["target"], strongest["target"], mean["cosine"], mean["concentration"])
            cells.append(" / ".join(f"{number:.2f}" for number in numbers))
        lines.append(f"| {search} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read_folder(folder: str) -> list[dict[str, Any]]:
    """Return the records in a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((ROOT / folder).glob("*.json"))]


TABLES: dict[str, tuple[str, Callable[[], str]]] = {  # file -> its mark, and what makes the table
    "README.md": ("results/demo", lambda: demo_table(read_folder("results/demo"))),
    "docs/victims.md": ("results/victims", lambda: victims_table(read_folder("results/victims"))),
    "docs/experiments/searches.md": ("results/searches.json", searches_table),
    **{
        f"docs/defenses/{name}.md": ("results/bench", lambda name=name: defense_table(name))
        for name in DEFENSES
    },
}


def main() -> int:
    """Replace or check what stands between the two marks in each file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if outdated")
    arguments = parser.parse_args()
    outdated = 0
    for name, (mark, make) in TABLES.items():
        page = ROOT / name
        begin, end = f"<!-- {mark} -->\n", "<!-- end -->\n"
        before, _, rest = page.read_text().partition(begin)
        old, _, after = rest.partition(end)
        new = make()
        if arguments.check and old != new:
            print(f"{name}: its table is outdated; run python scripts/tables.py")
            outdated = 1
        if not arguments.check:
            page.write_text(before + begin + new + end + after)
    return outdated


if __name__ == "__main__":
    sys.exit(main())
