"""How far a grid is: done, running, failed, left, and how long that takes."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unbackdoor.bench.cells import CLEAN, Cell, Victim, as_record, describe
from unbackdoor.bench.obtain import victim_files
from unbackdoor.bench.store import Store, is_running, read_records


class Status(NamedTuple):
    """Cells of a grid by what became of them, and an estimate of the time for those left."""

    done: int
    running: list[str]
    failed: dict[str, str]  # what, and the error
    left: int  # neither done nor failed; those running count
    victims_left: int  # to be trained for the cells that are left
    seconds: float | None  # on one worker; None while nothing has been measured
    guessed: int  # of the cells left, those of kinds that were never measured


def status_of(cells: Sequence[Cell], store: Store, given: str = "") -> Status:
    """Return how far ``cells`` are.

    Args:
        given: A folder where victims may lie already.
    """
    unique = {cell.key: cell for cell in cells}
    records = read_records(store, list(unique))
    failed = {
        key: error
        for key in unique
        if key not in records and (error := store.error_of(key)) is not None
    }
    left = [cell for key, cell in unique.items() if key not in records and key not in failed]
    running = [describe(cell) for cell in left if is_running(store, cell.key)]
    victims = [victim for victim in _victims(left) if not _is_there(victim, store, given)]
    seconds, guessed = estimate(left, victims, list(records.values()))
    return Status(
        len(records),
        running,
        {describe(unique[key]): error for key, error in failed.items()},
        len(left),
        len(victims),
        seconds,
        guessed,
    )


def estimate(
    left: Sequence[Cell], victims: Sequence[Victim], records: Sequence[Mapping[str, Any]]
) -> tuple[float | None, int]:
    """Return the seconds for ``left`` and their victims, and how many cells are a mere guess.

    A cell takes the median of the records of its defense and network, with a detector or without,
    on a clean victim or not (one repair of it serves all attacks): of those with its settings and
    its share of the images, or else of all of these, or else of all records. A victim takes that of
    the victims of its training and network, or else of all.
    """
    if not records:
        return (None, len(left)) if left else (0.0, 0)
    of_kind: dict[tuple[Any, ...], list[float]] = {}
    trained: dict[str, tuple[tuple[str, str], float]] = {}
    everything: list[float] = []
    for record in records:
        cell, seconds = record["cell"], record["seconds"]["all"]
        for one in _kinds(cell):
            of_kind.setdefault(one, []).append(seconds)
        everything.append(seconds)
        kind = (cell["victim"]["training"], cell["victim"]["arch"])
        if record["victim"]["seconds"] is not None:
            trained[record["victim"]["key"]] = (kind, record["victim"]["seconds"])
    total, guessed = 0.0, 0
    for cell in left:
        exactly, roughly = _kinds(as_record(cell))
        known = of_kind.get(exactly) or of_kind.get(roughly)
        guessed += known is None
        total += statistics.median(known or everything)
    for victim in victims:
        kind = (victim.training, victim.arch)
        alike = [seconds for other, seconds in trained.values() if other == kind]
        times = alike or [seconds for _, seconds in trained.values()]
        total += statistics.median(times) if times else 0.0
    return total, guessed


def as_lines(name: str, status: Status) -> list[str]:
    """Return a status in words."""
    lines = [
        f"{name}: {status.done} done, {len(status.running)} running, {len(status.failed)} failed, "
        f"{status.left} left with {status.victims_left} victims to train"
    ]
    lines += [f"  running: {what}" for what in status.running]
    lines += [f"  failed: {what}: {error}" for what, error in status.failed.items()]
    if status.left and status.seconds is None:
        lines.append("  time left: unknown until the first cell is done")
    elif status.left and status.seconds is not None:
        minutes = round(status.seconds / 60)
        guess = f"; {status.guessed} cells of kinds never measured" if status.guessed else ""
        lines.append(
            f"  time left: about {minutes // 60} h {minutes % 60} min on one worker{guess}"
        )
    return lines


def _kinds(cell: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what a recorded cell has in common with those of about its duration, and roughly."""
    victim = cell["victim"]
    detects, clean = cell.get("detection") is not None, victim["attack"] == CLEAN
    roughly = (cell["defense"], victim["arch"], detects, clean)
    settings = json.dumps([pair for pair in cell["settings"] if pair[0] != "seed"])
    return (*roughly, settings, cell["share"]), roughly


def _victims(cells: Sequence[Cell]) -> list[Victim]:
    return list({cell.victim.key: cell.victim for cell in cells}.values())


def _is_there(victim: Victim, store: Store, given: str) -> bool:
    """Tell whether a victim needs no training, as far as one sees without reading images."""
    if victim.settings is None:
        return True
    folders = [store.victim_folder(victim.key)]
    if given:
        folders.append(Path(given))
    places = [victim_files(victim, folder) for folder in folders]
    return any(files.tensors.is_file() and files.record.is_file() for files in places)
