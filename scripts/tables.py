"""Write the tables of the documentation from `results/`, or check that they are current.

    python scripts/tables.py [--check]

Who writes what, in `results/`:

- `demo/`: `unbackdoor demo --seed SEED`, whose `scores.json` each record is; the table has medians.
- `victims/`, `simclr/`: `unbackdoor attack`. `bench/`: `unbackdoor bench run`.
- `transfer/`: `unbackdoor transfer`. `enemies/`: `unbackdoor evaluate`.
- `searches.json`: `scripts/compare_searches.py`. `windows.json`: `scripts/scan_windows.py`.
- `development/`: `scripts/try_settings.py`. `images.jsonl`: `scripts/try_images.py`.
- `oracle-thresholds.json`: `scripts/oracle_thresholds.py`.
- `reestimation.jsonl`: `scripts/compare_reestimation.py`.
- `speed*.json`, `curves.json`, `scaling.json`: the measurements in `benchmarks/`.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from size_runs import sizes_table

from unbackdoor.bench.cells import NO_DEFENSE
from unbackdoor.bench.grid import (
    CLEAN_ROW,
    Entry,
    describe_schedule,
    entries,
    read_grid,
    row_settings,
)
from unbackdoor.bench.store import look_at, read_records
from unbackdoor.bench.tables import as_markdown, detection_table, mean_and_spread
from unbackdoor.bench.tables import lines as collected
from unbackdoor.defenses import DEFENSES
from unbackdoor.settings import PurifySettings
from unbackdoor.values import flatten

ROOT = Path(__file__).resolve().parent.parent
DEMO_ROWS = {
    "victim": "victim",
    "fine_tuned": "fine-tuned, 500 labels",
    "purified": "**purified, no labels**",
}
WHAT = ("acc", "asr", "pa")
READINGS = {
    "head": "own head",
    "probe": "probe",
    "reestimated": "probe, re-estimated",
    "fine_tuned": "probe, fine-tuned",
}
OURS = "CBD, changes of all images"


def demo_table(records: list[dict[str, Any]]) -> str:
    """Return the medians of the demo's records, in percent."""
    for record in records:
        seed = record["settings"]["seed"]
        if record["settings"] != json.loads(json.dumps(asdict(PurifySettings(seed=seed)))):
            raise SystemExit(f"results/demo: {record['command']} was run with other defaults")

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
    """Return the scores of every victim, and of the clean ones under every attack, in percent.

    The last columns are the median epoch's images a second, and what that is of the device's limit.
    """
    lines = [
        "| victim | attack | training | epochs, images | own head: ACC | ASR | PA "
        "| probe: ACC | ASR | PA | images/s | of the limit |",
        f"|---{'|---' * 11}|",
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
            median = statistics.median(seconds for _, seconds in record["history"])
            share = record.get("speed", {}).get("share_of_limit")  # the oldest have none
            cells.append(f"{record['data']['images'] / median:.0f}")
            cells.append("–" if share is None else f"{share:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def defense_table(defense: str) -> str:
    """Return what a defense did to the victim of `grids/defenses-cpu.toml`, in percent."""
    lines = [f"| | {' | '.join(READINGS.values())} |", "|---|---|---|---|---|"]
    for entry, record in records_of("defenses-cpu"):
        if entry.cell.defense in (NO_DEFENSE, defense):
            lines.append(f"| {entry.row} | {' | '.join(as_cells(record['scores']['after']))} |")
    return "\n".join(lines) + "\n"


def oracle_table(defense: str) -> str:
    """Return what a defense gives at the threshold that an oracle would pick, in percent."""
    lines = [
        f"| | oracle's threshold | {' | '.join(READINGS.values())} |",
        "|---|---|---|---|---|---|",
    ]
    found = json.loads((ROOT / "results/oracle-thresholds.json").read_text())
    for row, oracle in found[defense].items():
        cells = as_cells(oracle["scores"])
        lines.append(f"| {row} | {oracle['picked']:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def as_cells(scores: dict[str, Any], readings: Iterable[str] = READINGS) -> list[str]:
    """Return ACC / ASR / PA of each reading, in percent."""
    return [
        " / ".join(f"{100 * scores[reading][what]:.1f}" for what in WHAT) for reading in readings
    ]


@cache
def records_of(name: str) -> list[tuple[Entry, dict[str, Any]]]:
    """Return the entries of a grid that have a record in `results/bench`, with it."""
    found = entries(read_grid(ROOT / f"grids/{name}.toml"))
    records = read_records(look_at(ROOT / "results/bench"), [entry.cell.key for entry in found])
    return [(entry, dict(records[entry.cell.key])) for entry in found if entry.cell.key in records]


def changes_table() -> str:
    """Return what our default does to the victims of `grids/table1-cpu.toml`: means over seeds."""
    lines = [
        f"| trigger | backbone | {' | '.join(READINGS.values())} |",
        "|---|---|---|---|---|---|",
    ]
    names = {
        OURS: "purified",
        CLEAN_ROW: "clean victim",
        f"{CLEAN_ROW}, {OURS}": "clean victim, purified",
    }
    scores: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry, record in records_of("table1-cpu"):
        if entry.row in names or entry.cell.defense == NO_DEFENSE:
            place = entry.attack, names.get(entry.row, "victim")
            scores.setdefault(place, []).append(record["scores"]["after"])
    for (attack, name), seeds in sorted(scores.items(), key=lambda row: row[0][0]):
        lines.append(f"| {' | '.join([attack, name, *mean_cells(seeds)])} |")
    return "\n".join(lines) + "\n"


def taken_table() -> str:
    """Return what SimCLR victims lose under their triggers, beside what the clean one loses."""
    lines = [
        "| victim | epochs | probe | neighbours | clean one, probe | neighbours "
        "| lost by the victim | by the clean one |",
        f"|---{'|---' * 7}|",
    ]
    clean = json.loads((ROOT / "results/victims/clean-simclr-seed0.json").read_text())
    shipped = [
        json.loads(path.read_text())
        for path in sorted((ROOT / "results/victims").glob("*-simclr-seed0.json"))
        if not path.name.startswith("clean")
    ]
    for record in [*shipped, *read_folder("results/simclr")]:
        name = record["attack"]["name"]
        both = record["scores"], clean["scores"][name]
        cells = [cell for each in both for cell in as_cells(each, ("probe", "neighbours"))]
        lost = [f"{100 * (each['probe']['acc'] - each['probe']['pa']):.1f}" for each in both]
        lines.append(f"| {' | '.join([name, str(record['training']['epochs']), *cells, *lost])} |")
    return "\n".join(lines) + "\n"


def simclr_table() -> str:
    """Return what is done to SimCLR's victims with seed 0, in percent."""
    readings = {name: words for name, words in READINGS.items() if name != "head"}
    lines = [f"| trigger | row | {' | '.join(readings.values())} |", "|---|---|---|---|---|"]
    for entry, record in (*records_of("table3-cpu"), *records_of("simclr-cpu")):
        if entry.cell.seed != 0:
            continue
        cells = as_cells(record["scores"]["after"], readings)
        lines.append(f"| {entry.attack} | {entry.row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def detectors_table() -> str:
    """Return AP and PAP of the detectors of `grids/table6-cpu.toml`, in percent."""
    grid = read_grid(ROOT / "grids/table6-cpu.toml")
    records = {entry.cell.key: record for entry, record in records_of("table6-cpu")}
    table = detection_table(grid, collected(grid, entries(grid), records))
    return as_markdown(table) + "\n"


def transfer_table() -> str:
    """Return ACC and PA of every backbone on other data, means over the seeds, and deviations."""
    names = {"clean-simclr": "never poisoned", "blend-simclr": "no defense", "purified": "purified"}
    lines = [
        "| backbone | probe: ACC | ± | PA | ± | neighbours: ACC | ± | PA | ± | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    records = read_folder("results/transfer")
    for start, name in names.items():
        scores = [r["scores"] for r in records if r["checkpoint"]["name"].startswith(start)]
        cells = []
        for reader, what in itertools.product(("probe", "neighbours"), ("acc", "pa")):
            values = [100 * found[reader][what] for found in scores]
            cells += [f"{statistics.mean(values):.1f}", f"{statistics.stdev(values):.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(scores)} |")
    return "\n".join(lines) + "\n"


def windows_table() -> str:
    """Return the concentration and the cosine that a patch reaches in every window."""
    lines = []
    path = ROOT / "results/windows.json"
    for name, found in (json.loads(path.read_text()) if path.exists() else {}).items():
        lines += [
            f"| {name.partition('-')[0]}: top, left | {' | '.join(map(str, found['places']))} |",
            f"|---{'|---' * len(found['places'])}|",
        ]
        for top, row in zip(found["places"], found["rows"], strict=True):
            cells = [f"{gathered:.2f} / {cosine:.2f}" for gathered, cosine in row]
            lines.append(f"| {top} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def differences(settings: dict[str, Any], base: PurifySettings = PurifySettings()) -> str:
    """Return which of the flat settings differ from ``base``, in words."""
    usual = dict(flatten(asdict(base)))
    differs = {name: value for name, value in settings.items() if value != usual.get(name)}
    words = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in differs.items())
    return ", ".join(words) or "–"


def trials_table() -> str:
    """Return the trials on development victims, with the settings that differ from the defaults."""
    lines = [
        f"| victim | differs from the defaults | {' | '.join(READINGS.values())} |",
        "|---|---|---|---|---|---|",
    ]
    text = (ROOT / "results/development/trials.jsonl").read_text()
    for trial in sorted(map(json.loads, text.splitlines()), key=lambda trial: trial["victim"]):
        cells = as_cells(trial["scores"]["after"])
        name = trial["victim"].partition("-")[0]
        lines.append(f"| {name} | {differences(trial['settings'])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def open_points_table() -> str:
    """Return the trials of what the paper leaves open: of its method, reduced, and of ours."""
    grid = read_grid(ROOT / "grids/table1-cpu.toml")
    papers = next(row_settings(grid, row, 0) for row in grid.rows if row.name == "CBD")
    bases = {"image": ("the paper's", papers), "changes": ("ours", PurifySettings())}
    lines = [
        f"| method | victim | differs by | {' | '.join(READINGS.values())} |",
        f"|---{'|---' * (len(READINGS) + 2)}|",
    ]
    text = (ROOT / "results/development/open-points.jsonl").read_text()
    trials = [json.loads(line) for line in text.splitlines()]
    for kind, (method, base) in bases.items():
        for trial in trials:
            if trial["settings"]["search.kind"] == kind:
                differs = trial["code"] or differences(trial["settings"], base)
                victim = trial["victim"].partition("-")[0]
                cells = as_cells(trial["scores"]["after"])
                lines.append(f"| {' | '.join([method, victim, differs, *cells])} |")
    return "\n".join(lines) + "\n"


def reduced_table(name: str) -> str:
    """Return the means over the seeds of a grid that have records, row by row, in percent.

    Where there are several, the deviation stands behind each mean.
    """
    scores: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry, record in records_of(name):
        scores.setdefault((entry.attack, entry.row), []).append(record["scores"]["after"])
    grid = read_grid(ROOT / f"grids/{name}.toml")
    lines = [
        describe_schedule(grid),
        "",
        f"| attack | defense | {' | '.join(READINGS.values())} | seeds |",
        f"|---{'|---' * 6}|",
    ]
    order = sorted(scores.items(), key=lambda row: grid.attacks.index(row[0][0]))
    for (attack, row), seeds in order:
        lines.append(f"| {' | '.join([attack, row, *mean_cells(seeds), str(len(seeds))])} |")
    return "\n".join(lines) + "\n"


def lasting_table() -> str:
    """Return, by attack, the own head's mean ASR as delivered and the highest of all readings'.

    A reading that says nothing, as its fine-tuning broke the network, is left out.
    """
    kept: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry, record in records_of("table1-cpu"):
        told = " ".join(record["flags"])
        broken = {
            "fine_tuned": "fine-tuned with the probe" in told,
            "head_fine_tuned": "fine-tuned with the own head" in told,
        }
        scores = {
            name: value
            for name, value in record["scores"]["after"].items()
            if name != "neighbours" and value is not None and not broken.get(name)
        }
        kept.setdefault((entry.row, entry.attack), []).append(scores)
    attacks, rows = (list(dict.fromkeys(key[place] for key in kept)) for place in (1, 0))

    def mean(row: str, attack: str, reading: str, what: str = "asr") -> float | None:
        there = [scores[reading][what] for scores in kept[row, attack] if reading in scores]
        return mean_and_spread(there)[0]

    lines = [
        f"| defense | {' | '.join(attacks)} | accuracy |",
        f"|---{'|---' * (len(attacks) + 1)}|",
    ]
    for row in rows:
        cells, lost = [], []
        for attack in attacks:
            readings = set[str]().union(*kept[row, attack])
            delivered, worst = (
                mean(row, attack, "head"),
                max(mean(row, attack, r) for r in readings),
            )
            cells.append(f"{delivered:.0f} → {worst:.0f}")
            before, after = (mean(name, attack, "head", "acc") for name in ("No Defense", row))
            lost.append(after - before)
        lines.append(f"| {' | '.join([row, *cells, f'{statistics.fmean(lost):+.1f}'])} |")
    return "\n".join(lines) + "\n"


def mean_cells(seeds: list[dict[str, Any]]) -> list[str]:
    """Return ACC / ASR / PA of each reading, means over the seeds' scores, in percent."""
    return [
        " / ".join(mean_in_words([seed[reading][what] for seed in seeds]) for what in WHAT)
        for reading in READINGS
    ]


def mean_in_words(shares: list[float]) -> str:
    """Return the mean in percent, and the sample's standard deviation where it has one."""
    mean, spread = mean_and_spread(shares)
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def images_table() -> str:
    """Return what our default does with other images, below what it does with the usual 2,500."""
    lines = [
        f"| victim | images | differs from the defaults | {' | '.join(READINGS.values())} |",
        "|---|---|---|---|---|---|---|",
    ]
    path = ROOT / "results/images.jsonl"
    trials = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    usual = {
        entry.attack: record["scores"]["after"]
        for entry, record in records_of("table1-cpu")
        if entry.row == OURS and entry.cell.seed == 0
    }
    for victim in dict.fromkeys(trial["victim"] for trial in trials):
        attack = victim.partition("-")[0]
        lines.append(f"| {attack} | 2,500 | – | {' | '.join(as_cells(usual[attack]))} |")
        for trial in (trial for trial in trials if trial["victim"] == victim):
            words = [attack, trial["images"], differences(trial["settings"])]
            lines.append(f"| {' | '.join([*words, *as_cells(trial['scores'])])} |")
    return "\n".join(lines) + "\n"


def reestimation_table() -> str:
    """Return what is read after statistics are re-estimated on either images, in percent."""
    lines = ["| victim | backbone | images | own head | probe |", "|---|---|---|---|---|"]
    words = {"unlabeled": "the defense's", "validation": "others"}
    for line in (ROOT / "results/reestimation.jsonl").read_text().splitlines():
        found = json.loads(line)
        for images, scores in found["scores"].items():
            attack = found["victim"].partition("-")[0]
            cells = as_cells(scores, ("head", "probe"))
            lines.append(f"| {' | '.join([attack, found['backbone'], words[images], *cells])} |")
    return "\n".join(lines) + "\n"


def enemies_table() -> str:
    """Return the scores of every enemy's victim and of what our default makes of it."""
    lines = [f"| enemy | backbone | {' | '.join(READINGS.values())} |", "|---|---|---|---|---|---|"]
    for folder in sorted((ROOT / "results/enemies").iterdir()):
        for name in ("victim", "purified"):
            scores = json.loads((folder / f"{name}.json").read_text())["scores"]
            lines.append(f"| {folder.name} | {name} | {' | '.join(as_cells(scores))} |")
    return "\n".join(lines) + "\n"


def searches_table() -> str:
    """Return how close each search comes to the triggered features, and how concentrated it is."""
    path = ROOT / "results/searches.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    names = [name.partition("-")[0] for name in found]
    lines = [f"| search | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    for search in next(iter(found.values()), {}):
        cells = []
        for rows in found.values():
            mean, strongest = rows[search]["mean"], rows[search]["strongest"]
            numbers = (mean["target"], strongest["target"], mean["cosine"])
            numbers += (mean["neighbours"], mean["concentration"])
            cells.append(" / ".join(f"{number:.2f}" for number in numbers))
        lines.append(f"| {search} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read_folder(folder: str) -> list[dict[str, Any]]:
    """Return the records in a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((ROOT / folder).glob("*.json"))]


def speed_table() -> str:
    """Return the rates of all candidates, and their times relative to ours."""
    files = sorted(ROOT.glob("results/speed*.json"))
    parts = [part for file in files for part in json.loads(file.read_text())["parts"]]
    lines = [
        "| network: what | candidate | rate | time relative to the first | rounds |",
        "|---|---|---|---|---|",
    ]
    for part in parts:
        for name, row in part["rows"].items():
            middle, low, high = row["ratio"]
            rate = f"{row['rate']:,.{0 if row['rate'] >= 10 else 1}f} {row['unit']}"
            times = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            rounds = len(row["seconds"])
            lines.append(f"| {part['title']} | {name} | {rate} | {times} | {rounds} |")
    return "\n".join(lines) + "\n"


def curves_table() -> str:
    """Return what ``purify`` costs along every curve."""
    lines = [
        "| along | value | index, s | an epoch's start, s | step, s | epoch, s | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in json.loads((ROOT / "results/curves.json").read_text())["points"]:
        seconds = (f"{point['index']:.1f}", f"{point['start']:.1f}", f"{point['step']:.2f}")
        ends = (f"{point['epoch']:,.0f}", f"{point['memory'] / 2**20:,.0f}")
        cells = " | ".join((f"{point['value']:,}", *seconds, *ends))
        lines.append(f"| {point['curve']} | {cells} |")
    return "\n".join(lines) + "\n"


def scaling_table() -> str:
    """Return the seconds of an epoch in every way to run it, and how much faster that is."""
    lines = [
        "| run as | an epoch, s | times as fast as one process | rounds |",
        "|---|---|---|---|",
    ]
    for name, way in json.loads((ROOT / "results/scaling.json").read_text())["ways"].items():
        times, faster = way["seconds"], way["faster"]
        ratio = f"{statistics.median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f})"
        lines.append(f"| {name} | {statistics.median(times):.1f} | {ratio} | {len(times)} |")
    return "\n".join(lines) + "\n"


Table = tuple[str, str, Callable[[], str]]  # file, mark in it, what makes the table
TABLES: tuple[Table, ...] = (
    ("README.md", "results/demo", lambda: demo_table(read_folder("results/demo"))),
    ("docs/victims.md", "results/victims", lambda: victims_table(read_folder("results/victims"))),
    ("docs/experiments/simclr-cpu.md", "results/simclr", taken_table),
    ("docs/experiments/simclr-cpu.md", "results/bench", simclr_table),
    ("docs/detection.md", "results/bench", detectors_table),
    ("docs/detection.md", "results/transfer", transfer_table),
    ("docs/experiments/searches.md", "results/searches.json", searches_table),
    ("docs/experiments/changes.md", "results/bench", changes_table),
    ("docs/experiments/changes.md", "results/windows.json", windows_table),
    ("docs/experiments/tables-cpu.md", "results/bench", lasting_table),
    ("docs/experiments/tables-cpu.md", "results/reestimation.jsonl", reestimation_table),
    *(
        (
            "docs/experiments/tables-cpu.md",
            f"grids/{name}-cpu.toml",
            lambda name=name: reduced_table(f"{name}-cpu"),
        )
        for name in ("table1", "table2", "table7", "table8", "schedule")
    ),
    ("docs/experiments/changes.md", "results/development/trials.jsonl", trials_table),
    ("docs/experiments/open-points.md", "results/development/open-points.jsonl", open_points_table),
    ("docs/experiments/images.md", "results/images.jsonl", images_table),
    ("docs/experiments/enemies.md", "results/enemies", enemies_table),
    ("docs/cluster.md", "grids", sizes_table),
    ("docs/speed.md", "results/speed*.json", speed_table),
    ("docs/speed.md", "results/scaling.json", scaling_table),
    ("docs/speed.md", "results/curves.json", curves_table),
    ("docs/defenses/anp.md", "results/oracle-thresholds.json", lambda: oracle_table("anp")),
    ("docs/defenses/clp.md", "results/oracle-thresholds.json", lambda: oracle_table("clp")),
    *(
        (f"docs/defenses/{name}.md", "results/bench", lambda name=name: defense_table(name))
        for name in DEFENSES
    ),
)


def main() -> int:
    """Replace or check what stands between the two marks in each file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if outdated")
    arguments = parser.parse_args()
    outdated = 0
    for name, mark, make in TABLES:
        page = ROOT / name
        begin, end = f"<!-- {mark} -->\n", "<!-- end -->\n"
        before, _, rest = page.read_text().partition(begin)
        old, _, after = rest.partition(end)
        new = make()
        if arguments.check and old != new:
            print(f"{name}: its table {mark} is outdated; run python scripts/tables.py")
            outdated = 1
        if not arguments.check:
            page.write_text(before + begin + new + end + after)
    return outdated


if __name__ == "__main__":
    sys.exit(main())
