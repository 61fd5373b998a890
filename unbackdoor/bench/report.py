"""One self-contained HTML page of all that records say: tables, comparisons, losses, figures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from unbackdoor.bench.features import from_base64
from unbackdoor.bench.grid import CLEAN_ROW, Entry, Grid, drawn_entries
from unbackdoor.bench.tables import (
    READERS,
    Line,
    Reader,
    Record,
    all_tables,
    heading,
    label,
    lines,
    mean_and_spread,
    printed,
    read,
    readers_of,
)
from unbackdoor.outputs import losses_picture
from unbackdoor.report import (
    Note,
    Panel,
    Picture,
    Table,
    amplified_difference,
    images_picture,
    render_report,
    scatter_picture,
    tsne_picture,
)

GAIN = 2  # of the difference that a trigger makes


class Part(NamedTuple):
    """A grid, its cells and the records that there are."""

    grid: Grid
    found: Sequence[Entry]
    records: Mapping[str, Record]


def report_of(
    parts: Sequence[Part],
    features: Mapping[str, Mapping[str, Any]],
    detections: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """Return the report as an HTML page.

    Args:
        features: What ``cell_features`` kept, by key.
        detections: What ``read_detections`` returns, by key.
    """
    sections = [
        section
        for part in parts
        for section in (*sections_of(part), *detected(part.found, detections))
    ]
    named: dict[str, Entry] = {}  # grids share cells: each has the row of the first
    for part in parts:
        for entry in part.found:
            named.setdefault(entry.cell.key, entry)
    pictures = [
        picture
        for key, entry in named.items()
        if (kept := features.get(key)) is not None
        for picture in figures(kept, f"{kept['title']}, {entry.cell.victim.arch}, row {entry.row}")
    ]
    known = {key for part in parts for key in part.records}
    wanted = {entry.cell.key for part in parts for entry in part.found}
    return render_report(
        "Attacks and defenses",
        f"{len(known)} of {len(wanted)} cells are done. Accuracy (ACC), attack success rate (ASR) "
        "and accuracy on triggered images (PA) are read by a linear probe on the frozen features, "
        "unless a table says otherwise. What a defense only masks comes back when statistics are "
        "re-estimated or the network is fine-tuned: see the tables that ask whether it lasts.",
        (*sections, *pictures, *undrawn(parts, features), origins(parts)),
    )


def undrawn(parts: Sequence[Part], features: Mapping[str, Mapping[str, Any]]) -> list[Note]:
    """Say which pictures are lacking though their cells have records, and what makes them."""
    lacking = [
        f"{part.grid.name}: {printed(entry.attack)}, row {entry.row}"
        for part in parts
        for entry in drawn_entries(part.grid, part.found, part.grid.features)
        if entry.cell.key in part.records and "attack" not in features.get(entry.cell.key, {})
    ]
    if not lacking:
        return []
    how = "Features or images of these cells are not in the folder of the records; where the data"
    text = "\n".join([f"{how} are, unbackdoor bench draw makes them:", *lacking])
    return [Note("Pictures that are lacking", text)]


def origins(parts: Sequence[Part]) -> Note:
    """Say what computed the records, and the detectors in them, and how many of each."""
    records = {key: record for part in parts for key, record in part.records.items()}
    computed = [("", record) for record in records.values()]
    computed += [("detector, ", r["detection"]) for r in records.values() if "detection" in r]
    counts: Counter[str] = Counter()
    for what, made in computed:
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        code = f"revision {made['revision']}; {versions}"
        counts[f"{what}{made['device']}, {made['precision']}; {code}"] += 1
    text = "\n".join(f"{count} × {what}" for what, count in sorted(counts.items()))
    return Note("What computed the records", text)


def sections_of(part: Part) -> list[Table | Picture]:
    """Return the tables of a grid, how its defenses compare, and the losses of its methods."""
    if not part.records:
        return []
    rows = lines(part.grid, part.found, part.records)
    found: list[Table | Picture] = list(all_tables(part.grid, part.found, part.records))
    found += [comparison(part.grid, rows, reader) for reader in readers_of(part.grid)]
    return [*found, *curves(part.grid, rows)]


def comparison(grid: Grid, rows: Sequence[Line], reader: Reader) -> Picture:
    """Draw ACC against ASR, and against PA, of all rows; a point is a mean over seeds."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for what in ("asr", "pa"):
        groups = panels.setdefault(f"{what.upper()} over ACC, percent", {})
        for line in rows:
            x, y = (_mean(line, reader, name) for name in ("acc", what))
            if x is not None and y is not None:
                groups.setdefault(line.row, []).append((x, y))
    return scatter_picture(
        f"{heading(grid)}: how defenses compare, {READERS[reader]}",
        panels,
        x_label="ACC",
        caption="A point for each attack. The best corner is bottom right for ASR, top right for "
        f"PA. {CLEAN_ROW}: the same triggers on a network that was never poisoned.",
    )


def curves(grid: Grid, rows: Sequence[Line]) -> list[Picture]:
    """Draw the losses of each row of the method, attack by attack, of its first seed."""
    pictures = []
    for row in dict.fromkeys(line.row for line in rows):
        done = [line for line in rows if line.row == row and line.records]
        drawn = [line for line in done if line.records[0]["history"]]  # a baseline has none
        if row.startswith(CLEAN_ROW):
            drawn = drawn[:1]  # one repair, which is scored under every attack
        panels = []
        for line in drawn:
            (panel,) = losses_picture(line.records[0]["history"]).panels
            panels.append(Panel(panel.svg, f"{printed(line.attack)}: {panel.alt}"))
        if panels:
            names = ", ".join(printed(line.attack) for line in drawn)
            caption = f"The first seed that has a record; in this order: {names}."
            pictures.append(Picture(f"{heading(grid)}: losses of {row}", panels, caption))
    return pictures


def figures(kept: Mapping[str, Any], title: str) -> list[Picture]:
    """Draw features before and after, as in the paper's Figure 1, and triggers, as in Figure 2."""
    panels = {
        name: {group: torch.tensor(rows) for group, rows in groups.items()}
        for name, groups in kept["panels"].items()
    }
    found = [
        tsne_picture(
            f"Features: {title}",
            panels,
            strong=kept["strong"],
            seed=0,
            caption="Test images. Adversarial ones are those that the row's search, or the "
            "default one, finds in each backbone. Features are reduced to their first components "
            "before.",
        )
    ]
    if "attack" in kept:
        clean, triggered = (from_base64(kept["attack"][name]) for name in ("clean", "triggered"))
        rows = {
            "clean": clean,
            "triggered": triggered,
            f"difference, {GAIN} times": amplified_difference(clean, triggered, gain=GAIN),
        }
        found.append(images_picture(f"Trigger: {title}", rows))
    return found


def detected(
    found: Sequence[Entry], detections: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Picture]:
    """Draw what detectors find in some test images, clean and triggered, row by row."""
    return [
        Picture(
            f"Detections: {label(Line(entry.attack, entry.row, ()))}, seed {entry.cell.seed}, "
            f"{kept['title']}",
            [Panel(**panel) for panel in kept["panels"]],
            kept["caption"],
        )
        for entry in found
        for kept in detections.get(entry.cell.key, ())
    ]


def _mean(line: Line, reader: Reader, what: str) -> float | None:
    return mean_and_spread([read(record, reader, what) for record in line.records])[0]
