"""Tables made of records: pure functions, in which shares become percent.

Means and spreads (the sample's standard deviation) are over seeds.
"""

import csv
import importlib.resources
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

from unbackdoor.bench.cells import ATTACK_NAMES, CBD, CONTRASTIVE
from unbackdoor.bench.grid import CLEAN_ROW, Entry, Grid, describe_schedule
from unbackdoor.errors import printable
from unbackdoor.report import Flagged, Table

Reader = Literal["probe", "head", "paper"]
Record = Mapping[str, Any]

SEEDS = 3  # of rows with fewer, the note below a table tells
WHAT = ("acc", "asr", "pa")
COLUMNS = (
    *("grid", "attack", "row", "defense", "labels", "share", "seed", "when", "reading"),
    *(*WHAT, "images", "triggered", "seconds", "flags", "key", "victim_sha256"),
)
# Hash of the training images in ``../shared/data/cifar10``.
JPEG_CIFAR10 = "3953450bcd69b7d27e41ccbbb2814331ccf2d956677d6a203f1a26f964f6ef26"
DURABLE = {"probe": "delivered", "reestimated": "re-estimated", "fine_tuned": "fine-tuned"}
# Older records have none of these, or the first alone
OWN_HEAD_LATER = {"head_reestimated": "re-estimated", "head_fine_tuned": "fine-tuned"}
PAPER_ROWS = {CLEAN_ROW: "Clean Model"}  # the paper's name, where it has another
READERS: Mapping[Reader, str] = {
    "paper": "the paper's reading: the own head, but a linear probe after CBD and SFT, and where "
    "there is no head",
    "probe": "linear probe before and after",
    "head": "the backbone's own head before and after",
}


class Line(NamedTuple):
    """All records of one row of a table, a record a seed."""

    attack: str
    row: str
    records: tuple[Record, ...]


def lines(grid: Grid, found: Sequence[Entry], records: Mapping[str, Record]) -> list[Line]:
    """Collect the records of each row, attack by attack; rows without any are kept."""
    kept: dict[tuple[str, str], list[Record]] = {}
    for entry in sorted(found, key=lambda entry: grid.attacks.index(entry.attack)):
        place = kept.setdefault((entry.attack, entry.row), [])
        if entry.cell.key in records:
            place.append(records[entry.cell.key])
    return [Line(attack, row, tuple(values)) for (attack, row), values in kept.items()]


def all_tables(grid: Grid, found: Sequence[Entry], records: Mapping[str, Record]) -> list[Table]:
    """Return the tables of a grid: its detectors', scores by each reader, and whether they last.

    Columns of deviations are left out where no row has several seeds.
    """
    rows = lines(grid, found, records)
    readers = readers_of(grid)
    if grid.detection is None and grid.compares:
        readers.insert(0, "paper")
    tables = [
        *([] if grid.detection is None else [detection_table(grid, rows)]),
        *(scores_table(grid, rows, reader) for reader in readers),
        durability_table(grid, rows),
    ]
    return [_without_empty_spreads(table) for table in tables]


def readers_of(grid: Grid) -> list[Reader]:
    """Return by what the scores of all rows of a grid are read; SimCLR leaves no head."""
    return ["probe", "head"] if grid.training == "supervised" else ["probe"]


def _without_empty_spreads(table: Table) -> Table:
    kept = [
        place
        for place, name in enumerate(table.columns)
        if name != "±" or any(row[place] is not None for row in table.rows)
    ]
    return replace(
        table,
        columns=tuple(table.columns[place] for place in kept),
        rows=tuple(tuple(row[place] for place in kept) for row in table.rows),
    )


def scores_table(grid: Grid, rows: Sequence[Line], reader: Reader) -> Table:
    """Return ACC, ASR and PA in percent.

    In the paper's own reading the paper's numbers stand beside, and how much ours are above them.
    """
    beside = grid.compares and reader == "paper"
    columns = ["attack, defense"]
    for name in ("ACC", "ASR", "PA"):
        columns += [name, "±"] + (["paper", "ours − paper"] if beside else [])
    columns += ["seeds", "seconds"]
    body = []
    for line in rows:
        cells: list[Any] = [label(line)]
        figures = paper_figures(grid, line) if beside else {}
        for what in WHAT:
            mean, spread = mean_and_spread([read(r, reader, what) for r in line.records])
            cells += [mean, spread]
            if beside:
                cells += _beside(mean, figures.get(what.upper()))
        seconds = [float(record["seconds"]["defense"]) for record in line.records]
        cells += [len(line.records), statistics.median(seconds) if seconds else None]
        flags = _flags(line, [record["flags"] for record in line.records])
        cells[1] = Flagged(cells[1], flags) if flags and line.records else cells[1]
        body.append(tuple(cells))
    return Table(
        f"{heading(grid)}: {READERS[reader]}",
        tuple(columns),
        tuple(body),
        decimals=1,
        lead=describe_schedule(grid),
        note=_note(grid, rows),
    )


def durability_table(grid: Grid, rows: Sequence[Line]) -> Table:
    """Return ASR, PA and ACC of the probe as delivered and after what users do, in percent.

    ``comes back``: how much the worst ASR is above the one as delivered. A defense that removes a
    backdoor has about 0 there; one that only masks it has more.
    """
    figures: dict[str, Callable[[Record], float | None]] = {
        **{f"ASR {words}": partial(_score, reader=r, what="asr") for r, words in DURABLE.items()},
        "worst ASR": worst_asr,
        "comes back": comes_back,
        **{f"PA {words}": partial(_score, reader=r, what="pa") for r, words in DURABLE.items()},
        **{f"ACC {words}": partial(_score, reader=r, what="acc") for r, words in DURABLE.items()},
    }
    own = {
        f"own head: ASR {words}": partial(_score, reader=reader, what="asr")
        for reader, words in OWN_HEAD_LATER.items()
    }
    there = {
        name: figure
        for name, figure in own.items()
        if any(figure(record) is not None for line in rows for record in line.records)
    }
    if there:
        figures |= {"own head: ASR delivered": partial(_score, reader="head", what="asr"), **there}
    body = []
    for line in rows:
        cells: list[Any] = [label(line)]
        for figure in figures.values():
            cells += mean_and_spread([figure(record) for record in line.records])
        body.append((*cells, len(line.records)))
    return Table(
        f"{heading(grid)}: does it last?",
        ("attack, defense", *(part for name in figures for part in (name, "±")), "seeds"),
        tuple(body),
        decimals=1,
        lead=describe_schedule(grid),
        note="The probe as delivered; after batch-norm statistics are re-estimated on plain clean "
        "images; after a short clean fine-tuning. " + _note(grid, rows),
    )


def detection_table(grid: Grid, rows: Sequence[Line]) -> Table:
    """Return AP and PAP of the detectors in percent, as VOC 2007 defines them, then as COCO does.

    Beside a full schedule stand the paper's numbers, and how much VOC's are above them.
    """
    conditions = {"AP": "clean", "PAP": "triggered"}
    columns = ["attack, defense"]
    for name in conditions:
        columns += [name, "±"] + (["paper", "ours − paper"] if grid.compares else [])
    columns += [*(f"COCO's {name}" for name in conditions), "seeds", "seconds"]
    body = []
    for line in rows:
        cells: list[Any] = [label(line)]
        figures = paper_figures(grid, line) if grid.compares else {}
        made = [record["detection"] for record in line.records]
        for name, condition in conditions.items():
            mean, spread = mean_and_spread([each["scores"][condition]["voc07"] for each in made])
            cells += [mean, spread]
            if grid.compares:
                cells += _beside(mean, figures.get(name))
        for condition in conditions.values():
            cells.append(mean_and_spread([each["scores"][condition]["coco"] for each in made])[0])
        seconds = [float(each["seconds"]["training"]) for each in made]
        cells += [len(made), statistics.median(seconds) if seconds else None]
        flags = _flags(line, [each["flags"] for each in made])
        cells[1] = Flagged(cells[1], flags) if flags and made else cells[1]
        body.append(tuple(cells))
    data = [record["detection"]["data"] for line in rows for record in line.records]
    return Table(
        f"{heading(grid)}: average precision",
        tuple(columns),
        tuple(body),
        decimals=1,
        lead=describe_schedule(grid),
        note=_note(grid, rows, _about_detectors(grid, data)),
    )


def mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return mean and sample standard deviation in percent of what is there, as shares."""
    there = [100 * value for value in values if value is not None]
    if not there:
        return None, None
    return statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None


def worst_asr(record: Record) -> float | None:
    """Return the highest ASR of the probe's readings."""
    there = [_score(record, name, "asr") for name in DURABLE]
    return max((value for value in there if value is not None), default=None)


def comes_back(record: Record) -> float | None:
    """Return how much the highest ASR of the probe's readings is above the one as delivered."""
    worst, delivered = worst_asr(record), _score(record, "probe", "asr")
    return None if worst is None or delivered is None else worst - delivered


def read(record: Record, reader: Reader, what: str) -> float | None:
    """Return a score after the defense, as a share; None where there is no such reading."""
    if reader != "paper":
        return _score(record, reader, what)
    # Section 4.1: the baselines have the head; CBD and self-supervised backbones get a probe
    has_head = record["cell"]["defense"] not in (CBD, CONTRASTIVE)
    by_head = _score(record, "head", what) if has_head else None
    return by_head if by_head is not None else _score(record, "probe", what)


def paper_figures(grid: Grid, line: Line) -> Mapping[str, float]:
    """Return what the paper prints for a row, in percent; nothing if it does not have the row."""
    data = paper_tables().get(f"table{grid.table}", {}).get("data", {})
    rows: Mapping[str, Mapping[str, float]] = data.get(printed(line.attack), {})
    return rows.get(PAPER_ROWS.get(line.row, line.row), {})


def paper_tables() -> dict[str, Any]:
    """Return the numbers of the paper's tables."""
    text = (importlib.resources.files("unbackdoor.bench") / "paper_tables.json").read_text("utf-8")
    return dict(json.loads(text))


def heading(grid: Grid) -> str:
    """Return what stands above a table of ``grid``."""
    printed = paper_tables().get(f"table{grid.table}", {}).get("title", "")
    title = grid.title or (printed if grid.compares else printed.partition(",")[0])
    return f"Table {grid.table} ({grid.tier}){': ' if title else ''}{title}"


def label(line: Line) -> str:
    """Return the first cell of a row."""
    return f"{printed(line.attack)}: {line.row}"


def printed(attack: str) -> str:
    """Return the name of an attack as the paper prints it; a variant's is the grid's."""
    return ATTACK_NAMES.get(attack, attack)


def as_markdown(table: Table) -> str:
    """Return a table for a terminal and for a page of documentation, with its flags and note."""
    flags = list(dict.fromkeys(c.flag for row in table.rows for c in row if isinstance(c, Flagged)))
    places = 1 if table.decimals is None else table.decimals

    def text(cell: Any) -> str:
        if isinstance(cell, Flagged):
            return f"{text(cell.value)} [{flags.index(cell.flag) + 1}]"
        if cell is None:
            return "–"
        return f"{cell:z.{places}f}" if isinstance(cell, float) else plain(str(cell))

    def plain(words: str) -> str:  # names and flags are those of files
        return printable(words).replace("|", "\\|")

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return "\n".join(
        [
            f"**{table.title}**",
            "",
            *([table.lead, ""] if table.lead else []),
            line(table.columns),
            line(["---", *("--:" for _ in table.columns[1:])]),
            *(line([text(cell) for cell in row]) for row in table.rows),
            "",
            *(f"[{number}] {plain(flag)}" for number, flag in enumerate(flags, start=1)),
            table.note,
            "",
        ]
    )


def as_csv(grid: Grid, found: Sequence[Entry], records: Mapping[str, Record]) -> str:
    """Return all scores of a grid's records, a line for each reading, as shares; with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for entry in found:
        if (record := records.get(entry.cell.key)) is None:
            continue
        cell = record["cell"]
        about = {
            "grid": grid.name,
            "attack": entry.attack,
            "row": entry.row,
            **{name: cell[name] for name in ("defense", "labels", "share", "seed")},
            "seconds": record["seconds"]["defense"],
            "flags": "; ".join(record["flags"]),
            "key": entry.cell.key,
            "victim_sha256": record["victim"]["sha256"],
        }
        for when, readings in record["scores"].items():
            for reading, scores in readings.items():
                if scores is not None:
                    writer.writerow({**about, "when": when, "reading": reading, **scores})
    return out.getvalue()


def _score(record: Record, reader: str, what: str) -> float | None:
    scores = record["scores"]["after"].get(reader)
    return None if scores is None else float(scores[what])


def _beside(ours: float | None, paper: float | None) -> list[float | None]:
    """Return the paper's number, and how much ours is above it."""
    return [paper, None if ours is None or paper is None else ours - paper]


def _flags(line: Line, raised: Sequence[Sequence[str]]) -> str:
    """Return the flags of a row, with the seeds that have them where not all do.

    Args:
        raised: The flags of each record.
    """
    seeds: dict[str, list[int]] = {}
    for record, those in zip(line.records, raised, strict=True):
        for flag in those:
            seeds.setdefault(flag, []).append(record["cell"]["seed"])
    texts = [
        flag if len(found) == len(line.records) else f"{flag} (seed {', '.join(map(str, found))})"
        for flag, found in seeds.items()
    ]
    return "; ".join(texts)


def _note(grid: Grid, rows: Sequence[Line], about: str = "") -> str:
    """Return what stands below a table.

    Args:
        about: What its numbers are, of detectors; by default, they are those of the backbone.
    """
    records = [record for line in rows for record in line.records]
    computed = records if not about else [record["detection"] for record in records]
    parts = [] if grid.compares else ["Not comparable with the paper: compare within the table."]
    if records:
        parts.append(f"Percent. {about or _about_scores(records[0])}")
    if records and grid.clean:
        parts.append(
            f"The row {CLEAN_ROW!r} was never poisoned: what the trigger does to a clean network."
        )
    if grid.victim_seed is not None:
        rest = "split and defense" if grid.detection is None else "split, defense and detector"
        parts.append(f"Seeds share one victim: ± is of {rest} alone.")
    if any(0 < len(line.records) < SEEDS for line in rows):
        parts.append(f"Some rows have fewer than {SEEDS} seeds.")
    if len({record.get("scoring", 1) for record in records}) > 1:
        parts.append("The records are of several scorings; docs/benchmark.md compares them.")
    if any(r["data"]["train_sha256"] == JPEG_CIFAR10 for r in records):
        parts.append(
            "These CIFAR-10 images are JPEG files of quality 75: some points of accuracy below the "
            "lossless ones that the paper has."
        )
    victims: dict[str, set[str]] = {}
    for each in records:
        victims.setdefault(each["victim"]["key"], set()).add(each["victim"]["sha256"])
    if any(len(found) > 1 for found in victims.values()):
        parts.append(
            "Rows of one attack and seed are of different victims: one was trained anew, or its "
            "trigger has changed since."
        )
    if len({(r["data"]["train_sha256"], r["data"]["test_sha256"]) for r in records}) > 1:
        parts.append("The records are of different images.")
    for what in ("device", "precision", "revision"):
        if len(found := dict.fromkeys(each[what] for each in computed)) > 1:
            listed = f": {', '.join(found)}" if what != "revision" else " of the code"
            parts.append(f"The records are of {len(found)} {what}s{listed}.")
    return " ".join(parts)


def _about_scores(record: Record) -> str:
    scores, data = record["scores"]["after"]["probe"], record["data"]
    return (
        f"ACC on {scores['images']} test images, ASR and PA on those of other classes than the "
        f"target; the probe has {data['probe']} labels, other than the defense's."
    )


def _about_detectors(grid: Grid, data: Sequence[Mapping[str, Any]]) -> str:
    """Return what AP and PAP are.

    Args:
        data: What each record says about its test images.
    """
    images = f"{data[0]['images']} test images" if data else "the test images"
    parts = [
        f"AP: average precision on {images} as they are; PAP: on the same ones triggered; both as "
        "VOC 2007 defines it, over 11 recalls at an overlap of .5, and as COCO does, over overlaps "
        "from .5 to .95. "
        "Seconds are those of training a detector."
    ]
    if grid.compares:
        parts.append(
            "The paper names neither the settings of its detectors nor which average precision its "
            "numbers are."
        )
    if len({each["sha256"] for each in data}) > 1:
        parts.append("The detectors are scored on different images.")
    return " ".join(parts)
