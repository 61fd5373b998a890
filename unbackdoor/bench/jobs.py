"""What the command line does with grid files: run, look, print, report."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from unbackdoor.backbones import build, is_own
from unbackdoor.bench.backends import run_local, run_ray
from unbackdoor.bench.cells import CLEAN, Cell
from unbackdoor.bench.detection import check_detectors
from unbackdoor.bench.grid import (
    IMAGENET100,
    Entry,
    Grid,
    data_name,
    drawn_entries,
    entries,
    read_grid,
    unique_cells,
)
from unbackdoor.bench.obtain import Place, check_imagenet100, surrogate_of
from unbackdoor.bench.report import Part, report_of
from unbackdoor.bench.run import draw_cells, drop_unneeded, pending
from unbackdoor.bench.status import as_lines, status_of
from unbackdoor.bench.store import (
    forget_failures,
    look_at,
    open_store,
    read_detections,
    read_features,
    read_records,
)
from unbackdoor.bench.tables import all_tables, as_csv, as_markdown
from unbackdoor.checkpoint import write_text
from unbackdoor.data import check_there
from unbackdoor.errors import DataError, OutputError, SettingsError, unknown
from unbackdoor.settings import DeviceName, PrecisionName, at_home
from unbackdoor.types import OnStep, Say


class Plan(NamedTuple):
    """A grid with its cells."""

    grid: Grid
    found: list[Entry]

    @property
    def cells(self) -> list[Cell]:
        """Every cell once."""
        return unique_cells(self.found)


def plan_grids(
    paths: Sequence[Path],
    *,
    data: str | None = None,
    detection_data: str | None = None,
    rows: Sequence[str] = (),
    attacks: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> list[Plan]:
    """Read grid files.

    Args:
        data: Where the images are, in place of what the files say.
        detection_data: The same for the data of their detectors.
        rows: Only these, as tables name them; none are all.
        attacks: Likewise, victims of these, as grid files name them; ``clean`` for clean victims.
        seeds: Likewise.

    Raises:
        SettingsError: See ``read_grid``; or if there is no file, or no detector in one that
            is given data for them, or a row, an attack or a seed in none.
    """
    if not paths:
        raise SettingsError("pass one grid file or more, such as grids/smoke.toml")
    grids = [read_grid(path) for path in paths]
    if data is not None:
        grids = [replace(grid, data=data) for grid in grids]
    if detection_data is not None:
        grids = [_detecting_in(grid, detection_data) for grid in grids]
    plans = [Plan(grid, entries(grid)) for grid in grids]
    found = [entry for plan in plans for entry in plan.found]
    known_seeds = {entry.cell.seed for entry in found}
    for what, names, known in (
        ("row", rows, dict.fromkeys(entry.row for entry in found)),
        ("attack", attacks, dict.fromkeys(map(attack_named, found))),
    ):
        for name in names:
            if name not in known:
                raise SettingsError(unknown(what, name, known))
    for seed in seeds:
        if seed not in known_seeds:
            raise SettingsError(f"seed {seed} is in no grid; there are {sorted(known_seeds)}")

    def is_asked_for(entry: Entry) -> bool:
        return (
            (not rows or entry.row in rows)
            and (not attacks or attack_named(entry) in attacks)
            and (not seeds or entry.cell.seed in seeds)
        )

    return [plan._replace(found=list(filter(is_asked_for, plan.found))) for plan in plans]


def attack_named(entry: Entry) -> str:
    """Return the attack of an entry's victim as the grid names it."""
    return CLEAN if entry.cell.victim.attack == CLEAN else entry.attack


def run_grids(
    paths: Sequence[Path],
    results: Path,
    *,
    backend: Literal["local", "ray"] = "local",
    workers: int = 1,
    limit: int | None = None,
    rows: Sequence[str] = (),
    attacks: Sequence[str] = (),
    seeds: Sequence[int] = (),
    data: str | None = None,
    detection_data: str | None = None,
    retry: bool = False,
    drop_victims: bool = False,
    address: str | None = None,
    gpus: float = 0,
    device: DeviceName = "auto",
    precision: PrecisionName = "auto",
    say: Say = print,
    on_step: OnStep | None = None,
) -> int:
    """Run the cells of grid files that have no record yet; returns how many failed, now or before.

    A victim's cells are run together, also those of several grids, see :func:`together`.

    Raises:
        SettingsError: See :func:`plan_grids`; or if a number is out of range, or Ray is missing.
        ArchitectureError: See ``check_detectors``; nothing is run then.
        DataError: Likewise; or if there are no images where a grid has them.
    """
    if workers < 1 or (limit is not None and limit < 1):
        raise SettingsError(f"workers and limit are at least 1, got {workers} and {limit}")
    where: dict[str, Any] = {"data": data, "detection_data": detection_data}
    plans = plan_grids(paths, rows=rows, attacks=attacks, seeds=seeds, **where)
    left, store = limit, open_store(results)
    needed: dict[str, tuple[str, ...]] = {}
    if drop_victims:  # by cells that are not asked for as well
        needed = cells_by_victim(cell for plan in plan_grids(paths, **where) for cell in plan.cells)
    for arch in dict.fromkeys(plan.grid.arch for plan in plans):
        build(arch)  # says what is wrong with its name before anything runs
    for plan in plans:
        if retry:
            forget_failures(store, [cell.key for cell in plan.cells])
        left_of_it = pending(plan.cells, store)
        if left_of_it:
            _check_images(plan.grid)
        check_detectors(left_of_it, _detection_data(plan.grid))
    asked_for = {cell.key for plan in plans for cell in plan.cells}
    earlier = {key for key in asked_for if store.error_of(key) is not None}
    failed = len(earlier)
    for group in together(plans):
        name = ", ".join(plan.grid.name for plan in group)
        everything = unique_cells([entry for plan in group for entry in plan.found])
        cells = pending(everything, store)[:left]
        say(f"{name}: {len(cells)} cells to run, {len(everything) - len(cells)} not")
        before = sum(cell.key in earlier for cell in everything)
        if before:
            say(f"{name}: {before} cells failed before; --retry runs them again")
        place = place_of(group)._replace(
            device=device,
            precision=precision,
            drop=tuple(needed.items()),
        )
        common: dict[str, Any] = {"workers": workers, "say": say}
        if backend == "ray":
            tally = run_ray(cells, results, place, address=address, gpus=gpus, **common)
        else:
            tally = run_local(cells, results, place, on_step=on_step, **common)
        say(f"{name}: {tally.done} done, {tally.failed} failed, {tally.left} left to others")
        failed += tally.failed
        left = None if left is None else left - len(cells)
        if left == 0:
            break
    drop_unneeded(store, needed.items())
    return failed


def _check_images(grid: Grid) -> None:
    try:
        check_there(grid.data)
    except DataError as error:
        raise DataError(f"{grid.name}: {error}; pass --data, where the images are") from error
    folder = at_home(grid.data) / "train"
    if data_name(grid.data) == IMAGENET100 and folder.is_dir():
        inside = [path.name for path in folder.iterdir() if path.is_dir()]
        classes = [name for name in inside if not name.startswith(".")]
        if classes:  # of shards, only reading tells
            check_imagenet100(grid.data, classes)


def draw_grids(
    plans: Sequence[Plan],
    results: Path,
    *,
    device: DeviceName = "auto",
    precision: PrecisionName = "auto",
    say: Say = print,
    on_step: OnStep | None = None,
) -> None:
    """Keep what the report draws of cells that have a record, and whose features were not kept.

    Raises:
        UnbackdoorError: See ``draw_cells``.
    """
    store = open_store(results)
    for plan in plans:
        place = place_of([plan])._replace(device=device, precision=precision)
        drawn = draw_cells(plan.cells, store, place, say=say, on_step=on_step)
        say(f"{plan.grid.name}: drew {drawn} of {len(place.features)} cells")


def together(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Put grids together that find images, victims and starts at one place, in order.

    Grids of other places share no victim, or would look for it elsewhere. A grid without detectors
    goes with one that has them.
    """

    def where(grid: Grid) -> tuple[str, ...]:
        return grid.data, grid.victims, grid.start

    detecting = {
        where(plan.grid): _detection_data(plan.grid) for plan in plans if plan.grid.detection
    }
    groups: dict[tuple[str, ...], list[Plan]] = {}
    for plan in plans:
        at = where(plan.grid)
        detection = _detection_data(plan.grid) or detecting.get(at, "")
        groups.setdefault((*at, detection), []).append(plan)
    return list(groups.values())


def place_of(plans: Sequence[Plan]) -> Place:
    """Return where the grids of one group of :func:`together` find things."""
    grid = plans[0].grid
    return Place(
        data=grid.data,
        victims=grid.victims,
        features=tuple(key for plan in plans for key in featured(plan)),
        detection=next(filter(None, (_detection_data(plan.grid) for plan in plans)), ""),
        pictures=tuple(key for plan in plans for key in pictured(plan)),
        start=grid.start,
        own=tuple(row.defense for plan in plans for row in plan.grid.rows if is_own(row.defense)),
    )


def featured(plan: Plan) -> tuple[str, ...]:
    """Return the keys of the cells whose features the report draws: those of the first seed."""
    drawn = drawn_entries(plan.grid, plan.found, plan.grid.features)
    return tuple(entry.cell.key for entry in drawn)


def cells_by_victim(cells: Iterable[Cell]) -> dict[str, tuple[str, ...]]:
    """Return the keys of the cells that need a victim, CLA's surrogate among them, by its key."""
    keys: dict[str, tuple[str, ...]] = {}
    for cell in cells:
        for victim in (cell.victim, surrogate_of(cell.victim)):
            if victim is not None:
                keys[victim.key] = (*keys.get(victim.key, ()), cell.key)
    return keys


def grids_status(plans: Sequence[Plan], results: Path) -> list[str]:
    """Return how far grid files are, in lines, and, where these share work, all of them together.

    Raises:
        OutputError: If a record cannot be read.
    """
    store = look_at(results)
    parts = [(plan.grid.name, plan.cells, plan.grid.victims) for plan in plans]
    for group in together(plans):
        cells = unique_cells([entry for plan in group for entry in plan.found])
        if len(cells) < sum(len(plan.cells) for plan in group):
            name = f"{', '.join(plan.grid.name for plan in group)}, which share cells"
            parts.append((name, cells, group[0].grid.victims))
    return [
        line
        for name, cells, victims in parts
        for line in as_lines(name, status_of(cells, store, victims))
    ]


def grids_tables(
    plans: Sequence[Plan], results: Path, *, form: Literal["markdown", "csv"] = "markdown"
) -> str:
    """Return the tables of grid files as Markdown; or as CSV the scores that they are made of.

    Raises:
        OutputError: If a record cannot be read, or there is no such folder.
    """
    if not results.is_dir():
        raise OutputError(f"{results}: there is no such folder of records; pass --results")
    if form == "csv":
        texts = [as_csv(plan.grid, plan.found, _records(plan, results)) for plan in plans]
        header, _ = texts[0].split("\n", 1)
        return header + "\n" + "".join(text.split("\n", 1)[1] for text in texts)
    return "\n".join(
        as_markdown(table)
        for plan in plans
        for table in all_tables(plan.grid, plan.found, _records(plan, results))
    )


def write_report(plans: Sequence[Plan], results: Path, out: Path, *, overwrite: bool) -> None:
    """Write the report of grid files.

    Raises:
        OutputError: If a record cannot be read, or ``out`` exists and must not be replaced.
    """
    parts = [Part(plan.grid, plan.found, _records(plan, results)) for plan in plans]
    store = look_at(results)
    features = {
        cell.key: kept
        for plan in plans
        for cell in plan.cells
        if (kept := read_features(store, cell.key)) is not None
    }
    detections = {
        cell.key: read_detections(store, cell.key) for plan in plans for cell in plan.cells
    }
    write_text(out, report_of(parts, features, detections), overwrite=overwrite)


def pictured(plan: Plan) -> tuple[str, ...]:
    """Return the keys of the cells whose detections the report draws: those of the first seed."""
    rows = () if plan.grid.detection is None else plan.grid.detection.pictures
    return tuple(entry.cell.key for entry in drawn_entries(plan.grid, plan.found, rows))


def _detection_data(grid: Grid) -> str:
    return "" if grid.detection is None else grid.detection.data


def _detecting_in(grid: Grid, data: str) -> Grid:
    if grid.detection is None:
        raise SettingsError(f"{grid.name}: has no detectors; --detection-data is for theirs")
    return replace(grid, detection=replace(grid.detection, data=data))


def _records(plan: Plan, results: Path) -> Mapping[str, Mapping[str, Any]]:
    return read_records(look_at(results), [cell.key for cell in plan.cells])
