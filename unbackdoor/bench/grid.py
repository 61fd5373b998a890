"""A grid file: which rows a table has, and so which cells.

::

    table = "1"                       # of the paper
    tier = "cpu"                      # paper, h200, cpu or smoke
    data = "cifar10:../../shared/data/cifar10"  # a path is relative to the file
    arch = "cifar/wrn16_1"
    training = "supervised"
    preset = "cpu"                    # of the victims
    victims = "../results/victims"    # where they may lie already; the others are trained
    start = "clean.safetensors"       # from which they are trained on, or else from new weights
    victim_seed = 0                   # one victim of each attack for all seeds, or else one each
    attacks = ["badnets", "blend"]
    seeds = [0, 1, 2]

    [victim]                          # what differs from the preset
    epochs = 12

    [cbd]                             # what all rows of this method share
    preset = "cifar10"
    epochs = 4

    [variants."badnets, 1 %"]         # an attack with other options; listed in attacks by this name
    attack = "badnets"
    share = 0.01                      # and other attributes of ``Attack``
    trigger = { position = "center" } # and of its trigger

    [[rows]]
    name = "ANP"                      # in the table, and in the paper's
    defense = "anp"
    labels = "given"
    settings = { iterations = 500 }

    [detection]                       # a detector on the backbone of each cell
    data = "voc:../../shared/data/bccd"
    stages = ["block2", "relu"]
    epochs = 6                        # and other settings of ``DetectionSettings``
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from unbackdoor.attacks.named import SMALL, named_attack
from unbackdoor.backbones import is_own, own_hash
from unbackdoor.bench.cells import (
    ATTACK_NAMES,
    CBD,
    CLEAN,
    DEMO,
    NO_DEFENSE,
    Cell,
    Detection,
    Pairs,
    Victim,
    in_words,
)
from unbackdoor.checkpoint import sha256_of
from unbackdoor.defense_jobs import find_defense
from unbackdoor.defenses import DEFENSES
from unbackdoor.errors import ArchitectureError, SettingsError, unknown
from unbackdoor.settings import (
    PRESETS,
    SCHEMES,
    SHARES,
    DetectionSettings,
    LabelKind,
    PurifySettings,
    VictimSettings,
    at_home,
    purify_preset,
    victim_preset,
)
from unbackdoor.values import changed, flatten, made, nested

Tier = Literal["paper", "h200", "cpu", "smoke"]
CLEAN_ROW = "Clean victim"
IMAGENET100 = "imagenet100"  # the folder that tables 4 to 6 are of
OWN = "path/to/file.py:function"
LABELS_IN_WORDS: Mapping[LabelKind, str] = {
    "given": "with true labels",
    "pseudo": "with the victim's predictions",
    "none": "without labels",
}


@dataclass(frozen=True)
class Row:
    """A row of a table: one defense with its settings.

    Attributes:
        name: In the table, and in the paper's where that has it.
        defense: ``none``, ``cbd``, a name in ``DEFENSES``, or ``path/to/file.py:function``, as
            ``unbackdoor defend`` takes it.
        labels: What the defense is told; by default, given where it needs any, and none to a file.
        share: Of the training images; the paper's by default.
        settings: What differs from the defense's defaults.
        innocent: Whether it is run on the clean victim too, as a row of its own.
    """

    name: str
    defense: str
    labels: LabelKind | None = None
    share: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    innocent: bool = False


@dataclass(frozen=True)
class DetectionTask:
    """What the backbone of each cell is tried on: the table ``[detection]``.

    Attributes:
        data: ``voc:DIR``, see ``load_voc``.
        train: The set to train on.
        test: The set to score on.
        stages: See ``find_levels``.
        pictures: Rows whose detections the report draws, of the first seed.
        settings: What differs from the defaults of ``DetectionSettings``; these stand in the same
            table as the keys above.
    """

    data: str
    train: str = "trainval"
    test: str = "test"
    stages: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


class Variant(NamedTuple):
    """An attack with other options: a table ``[variants.NAME]``."""

    attack: str
    options: Mapping[str, Any]  # attributes of ``Attack``, and of its trigger, that differ


@dataclass(frozen=True)
class Grid:
    """A grid file, see the top of this module.

    Attributes:
        name: The file's, without its suffix.
        title: Above the table; the paper's by default.
        target: The attacker's class.
        variants: By the names that stand for them among ``attacks``.
        size: Side of the images in pixels; 0 is the architecture's.
        start: A checkpoint that all victims are trained on from, in place of new weights.
        victim_seed: Of the one victim of each attack that all seeds share, where they do.
        clean: Whether a clean victim is a row.
        features: Rows whose features the report draws, before and after.
        detection: What detectors are trained on; ``None`` for a table without any.
    """

    name: str
    table: str
    tier: Tier
    data: str
    arch: str
    attacks: tuple[str, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    training: Literal["supervised", "simclr"] = "supervised"
    preset: str = "paper"
    title: str = ""
    victims: str = ""
    target: int = 6
    variants: Mapping[str, Variant] = field(default_factory=dict)
    size: int = 0
    start: str = ""
    victim_seed: int | None = None
    clean: bool = True
    victim: Mapping[str, Any] = field(default_factory=dict)
    cbd: Mapping[str, Any] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    detection: DetectionTask | None = None

    @property
    def compares(self) -> bool:
        """Whether the paper's numbers, of ResNet-18, may stand beside these results."""
        images = IMAGENET100 if self.table in ("4", "5", "6") else "cifar10"
        alike = self.arch.endswith("/resnet18") and data_name(self.data) == images
        if self.detection is not None:
            alike = alike and Path(self.detection.data.rpartition(":")[2]).name == "VOC2007"
        return self.tier in ("paper", "h200") and alike


class Entry(NamedTuple):
    """A cell with its place in a table."""

    attack: str
    row: str
    cell: Cell


def read_grid(path: Path) -> Grid:
    """Read a grid file; files that hold the defense of a row are run.

    Raises:
        SettingsError: If it cannot be read, lacks a key, or holds an unknown key, defense, attack
            or setting; the nearest name is given. Or if the file of a defense fails.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from error
    if "name" in table:
        raise SettingsError(f"{path}: key 'name' is unknown; a grid is named as its file")
    rows = table.pop("rows", [])
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise SettingsError(f"{path}: has no rows; a row is a table [[rows]]")
    read: tuple[Row, ...] = tuple(made(Row, row, f"{path.name}, a row") for row in rows)
    read = tuple(
        replace(row, defense=str((path.parent / row.defense).resolve()))
        if is_own(row.defense)
        else row
        for row in read
    )
    if "detection" in table:
        table["detection"] = _task(path, table["detection"])
    if "variants" in table:
        table["variants"] = _variants(path, table["variants"])
    grid: Grid = made(Grid, {**table, "name": path.stem, "rows": read}, path.name)
    grid = replace(
        grid,
        data=_beside(path, grid.data),
        victims=str(path.parent / at_home(grid.victims)) if grid.victims else "",
        start=str(path.parent / at_home(grid.start)) if grid.start else "",
    )
    _check(grid)
    entries(replace(grid, seeds=grid.seeds[:1]))  # refuses unknown settings before anything runs
    return grid


def entries(grid: Grid) -> list[Entry]:
    """Return all cells of a grid, those of one victim one after the other.

    Raises:
        SettingsError: If a setting of a victim or a defense is unknown or out of range.
    """
    found = []
    for seed in grid.seeds:
        if grid.clean:
            victim = victim_of(grid, CLEAN, seed)
            rows = {CLEAN_ROW: Row(CLEAN_ROW, NO_DEFENSE)}
            rows |= {f"{CLEAN_ROW}, {row.name}": row for row in grid.rows if row.innocent}
            found += [
                Entry(attack, name, cell_of(grid, row, victim, attack, seed))
                for attack in grid.attacks
                for name, row in rows.items()
            ]
        for attack in grid.attacks:
            victim = victim_of(grid, attack, seed)
            found += [
                Entry(attack, row.name, cell_of(grid, row, victim, attack, seed))
                for row in grid.rows
            ]
    return found


def drawn_entries(grid: Grid, found: Iterable[Entry], rows: Sequence[str]) -> list[Entry]:
    """Return those of ``rows`` that the report draws something of: of the first seed."""
    return [e for e in found if e.row in rows and e.cell.seed == grid.seeds[0]]


def unique_cells(found: Iterable[Entry]) -> list[Cell]:
    """Return every cell once, in order."""
    return list({entry.cell.key: entry.cell for entry in found}.values())


def victim_of(grid: Grid, attack: str, seed: int) -> Victim:
    """Return the victim of ``attack``; of the package itself, there is one for all seeds."""
    settings = None
    attack, planted = planted_by(grid, attack)
    seed = seed if grid.victim_seed is None else grid.victim_seed
    if grid.preset != DEMO:
        try:
            preset = victim_preset(grid.preset, training=grid.training, attack=attack)
        except SettingsError as error:
            raise SettingsError(f"{grid.name}: {error}") from error
        settings = changed(VictimSettings(), preset, "preset")
        where = f"{grid.name}, [victim]"
        settings = changed(settings, _without_seed(grid.victim, where), where)
        settings = replace(settings, seed=seed)
    return Victim(
        attack=attack,
        training=grid.training,
        arch=grid.arch,
        data=data_name(grid.data),
        size=grid.size,
        target=grid.target,
        seed=0 if settings is None else seed,
        settings=settings,
        start=file_hash(grid.start),
        planted=planted,
    )


def planted_by(grid: Grid, name: str) -> tuple[str, Pairs]:
    """Return which attack a name in a grid stands for, and what differs from its own options.

    Raises:
        SettingsError: If the attack has no such option, or a value is out of range.
    """
    if name not in grid.variants:
        return name, ()
    attack, options = grid.variants[name]
    where = f"{grid.name}, variant {name!r}"
    try:
        whole = named_attack(
            attack, size=grid.size or SMALL, training=grid.training, options=options
        )
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error
    values = dict(flatten(asdict(whole)))  # as the fields have them: 1 is 1.0
    return attack, tuple(sorted((option, values[option]) for option, _ in flatten(options)))


def cell_of(grid: Grid, row: Row, victim: Victim, attack: str, seed: int) -> Cell:
    """Return the cell of one row."""
    labels, share = told_to(row)
    settings = row_settings(grid, row, seed)
    values = asdict(settings) if settings else {}
    if row.defense == CBD and settings.search.kind != "changes":
        del values["changes"]  # of no effect
    if row.defense == CBD and not settings.trim:
        del values["trim"]  # likewise; which cells did not have before there was that setting
    if row.defense == "bcu" and settings.spread == "pytorch":
        del values["spread"]  # likewise: it was the only one before there was that setting
    if row.defense == "fine-pruning" and settings.most == 1:
        del values["most"]  # likewise
    attack, planted = planted_by(grid, attack)
    return Cell(
        victim=victim,
        attack=attack,
        defense=Path(row.defense).name,
        settings=tuple(sorted(flatten(values))),
        labels=labels if row.defense != NO_DEFENSE else "none",
        share=share if row.defense != NO_DEFENSE else 0.0,
        seed=seed,
        detection=make_detection(grid, seed),
        code=own_hash(row.defense),
        planted=planted,
    )


def told_to(row: Row) -> tuple[LabelKind, float]:
    """Return which labels the defense of a row is told, and of which share of the images."""
    needs = row.defense in DEFENSES and DEFENSES[row.defense].labels
    labels: LabelKind = row.labels or ("given" if needs else "none")
    return labels, SHARES[labels] if row.share is None else row.share


def make_detection(grid: Grid, seed: int) -> Detection | None:
    """Return the detector of a cell; ``None`` in a grid without any."""
    task, where = grid.detection, f"{grid.name}, [detection]"
    if task is None:
        return None
    scheme, _, place = task.data.partition(":")
    if scheme != "voc" or Path(place).name in ("", ".."):
        raise SettingsError(f"{where}: data is voc:DIR, a folder by its name, got {task.data!r}")
    settings = changed(DetectionSettings(), task.settings, where)
    return Detection(
        data=Path(place).name,
        train=task.train,
        test=task.test,
        stages=task.stages,
        settings=replace(settings, seed=seed),
    )


def _without_seed(table: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if "seed" in table:
        raise SettingsError(f"{where}: seed is no setting here; the grid's seeds say which run")
    return table


def row_settings(grid: Grid, row: Row, seed: int) -> Any:
    """Return the settings dataclass of a row's defense; ``None`` without a defense."""
    where = f"{grid.name}, row {row.name!r}"
    if row.defense == NO_DEFENSE:
        if row.settings:
            raise SettingsError(f"{where}: no defense has no settings")
        return None
    if row.defense == CBD:
        alone = "preset" in row.settings  # a row with a preset of its own has nothing of the grid's
        table = dict(row.settings) if alone else _merged(grid.cbd, row.settings)
        preset = table.pop("preset", "default")
        if preset not in PRESETS:
            raise SettingsError(f"{where}: {unknown('preset', preset, PRESETS)}")
        settings = changed(purify_preset(preset), _without_seed(table, where), where)
        return replace(settings, seed=seed)
    own = is_own(row.defense)
    defaults = _own_defaults(row.defense, where) if own else DEFENSES[row.defense].settings()
    settings = changed(defaults, _without_seed(row.settings, where), where)
    has_seed = any(item.name == "seed" for item in fields(settings))
    return replace(settings, seed=seed) if has_seed else settings


def file_hash(path: str) -> str:
    """Return the SHA-256 of a file; nothing if there is none."""
    return sha256_of(Path(path)) if Path(path).is_file() else ""


def find_own(cell: Cell, places: Iterable[str]) -> str:
    """Return the one of ``places`` that has the defense of a cell, or a name as it is.

    Raises:
        SettingsError: If the file is no longer there, or no longer the same.
    """
    if not cell.code:
        return cell.defense
    for place in places:
        if Path(place).name == cell.defense and own_hash(place) == cell.code:
            return place
    raise SettingsError(f"{cell.defense} is not what it was when the grid was read; start again")


def settings_of(cell: Cell, defaults: Any = None) -> Any:
    """Return the settings dataclass that ``cell`` holds as pairs.

    Args:
        defaults: Of the defense; needed for a function in a file.
    """
    if defaults is None:
        defaults = PurifySettings() if cell.defense == CBD else DEFENSES[cell.defense].settings()
    if cell.defense == "bcu":  # see cell_of
        defaults = replace(defaults, spread="pytorch")
    return changed(defaults, nested(cell.settings), cell.defense)


def data_name(data: str) -> str:
    """Return the name of a source of images: its scheme, or the last part of its path."""
    scheme, colon, _ = data.partition(":")
    return scheme if colon else Path(data).name


def describe_schedule(grid: Grid) -> str:
    """Return in words what a grid fixes beside the defaults; stands above its table."""
    begun = f", trained on from {Path(grid.start).name}" if grid.start else ""
    shared = "" if grid.victim_seed is None else f", all of seed {grid.victim_seed}"
    differing = {name: value for name, value in grid.victim.items() if name != "epochs"}
    victims = f"victims: preset {grid.preset}{_lengths(grid)}{_differences(differing)}"
    parts = [f"{victims}{begun}{shared}"]
    for name in filter(grid.variants.__contains__, grid.attacks):
        attack, planted = planted_by(grid, name)
        parts.append(f"{name}: {attack}{in_words(planted)}")
    if grid.cbd and any(row.defense == CBD for row in grid.rows):
        parts.append(f"cbd:{_differences(grid.cbd).removeprefix(',')}")
    parts += [
        f"{row.name}:{_differences(row.settings).removeprefix(',')}"
        for row in grid.rows
        if row.settings
    ]
    told: dict[tuple[LabelKind, float], list[str]] = {}
    for row in grid.rows:
        if row.defense != NO_DEFENSE:
            told.setdefault(told_to(row), []).append(f"{row.name!r}")
    parts += [
        f"{100 * share:g} % of the training images {LABELS_IN_WORDS[labels]}: {', '.join(names)}"
        for (labels, share), names in told.items()
    ]
    detection = make_detection(grid, seed=0)
    if grid.detection is not None and detection is not None:
        stages = f", stages {' '.join(detection.stages)}" if detection.stages else ""
        sets = f"{detection.data}, sets {detection.train} and {detection.test}"
        parts.append(f"detectors: {sets}{stages}{_differences(grid.detection.settings)}")
    return f"Tier {grid.tier}. " + "; ".join(parts) + ". All else is the default."


def _lengths(grid: Grid) -> str:
    """Return how long victims are trained, and which attacks' are trained otherwise."""
    usual = victim_of(grid, CLEAN, grid.seeds[0]).settings
    if usual is None:  # they come with the package
        return ""
    text = f" of {usual.epochs} epochs" + (f" of {usual.limit:,} images" if usual.limit else "")
    for attack in grid.attacks:
        settings = victim_of(grid, attack, grid.seeds[0]).settings
        if settings is not None and settings.epochs != usual.epochs:
            text += f" ({attack}: {settings.epochs})"
    return text


def _differences(table: Mapping[str, Any]) -> str:
    return "".join(f", {name} {value}" for name, value in flatten(table))


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(shared)
    for name, value in own.items():
        before = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(before, Mapping)
        merged[name] = {**before, **value} if both else value  # type: ignore[dict-item]
    return merged


def _variants(path: Path, table: Any) -> dict[str, Variant]:
    """Return the tables ``[variants.NAME]`` of a grid file."""
    found = {}
    for name, values in table.items() if isinstance(table, Mapping) else [("", table)]:
        if not isinstance(values, Mapping):
            raise SettingsError(f"{path.name}: variants are tables [variants.NAME], got {table!r}")
        where = f"{path.name}, variant {name!r}"
        attack, options = values.get("attack"), {k: v for k, v in values.items() if k != "attack"}
        if name in (CLEAN, *ATTACK_NAMES, *ATTACK_NAMES.values()):
            raise SettingsError(f"{where}: is the name of an attack as it is; choose another")
        if attack not in ATTACK_NAMES:
            raise SettingsError(f"{where}: {unknown('attack', attack, ATTACK_NAMES)}")
        if not flatten(options):
            raise SettingsError(f"{where}: differs in nothing; pass a share, a trigger, or another")
        if "target" in options:
            raise SettingsError(f"{where}: target is a key of the grid, for all its attacks")
        found[name] = Variant(attack, options)
    return found


def _task(path: Path, table: Any) -> DetectionTask:
    """Return the table ``[detection]`` of a grid file."""
    where = f"{path.name}, [detection]"
    if not isinstance(table, Mapping):
        raise SettingsError(f"{where}: detection is a table, got {table!r}")
    own = [item.name for item in fields(DetectionTask) if item.name != "settings"]
    settings = [item.name for item in fields(DetectionSettings) if item.name != "seed"]
    for name in table:
        if name not in own + settings:
            raise SettingsError(f"{where}: {unknown('key', name, own + settings)}")
    values = {name: table[name] for name in own if name in table}
    differing = {name: value for name, value in table.items() if name in settings}
    task: DetectionTask = made(DetectionTask, {**values, "settings": differing}, where)
    return replace(task, data=_beside(path, task.data))


def _check(grid: Grid) -> None:
    if is_own(grid.arch):
        raise SettingsError(
            f"{grid.name}: arch: {grid.arch}: a network in a file cannot be in a grid, as no key "
            "tells its versions apart; use unbackdoor attack and defend"
        )
    if grid.start and not Path(grid.start).is_file():
        raise SettingsError(f"{grid.name}: start: {grid.start}: no such file")
    drawn = () if grid.detection is None else grid.detection.pictures
    for name, value, known in (
        *(("attack", attack, (*ATTACK_NAMES, *grid.variants)) for attack in grid.attacks),
        *(
            ("defense", row.defense, (NO_DEFENSE, CBD, *DEFENSES, OWN))
            for row in grid.rows
            if not is_own(row.defense)
        ),
        *(("features", name, [row.name for row in grid.rows]) for name in grid.features),
        *(("pictures", name, [CLEAN_ROW, *(row.name for row in grid.rows)]) for name in drawn),
    ):
        if value not in known:
            raise SettingsError(f"{grid.name}: {unknown(name, value, known)}")
    names = [row.name for row in grid.rows]
    if len(set(names)) < len(names) or CLEAN_ROW in names:
        raise SettingsError(f"{grid.name}: two rows have one name: {', '.join(sorted(names))}")
    for row in grid.rows:
        if row.share is not None and not 0 < row.share <= 1:
            raise SettingsError(
                f"{grid.name}: {row.name}: share is above 0 and at most 1, got {row.share:g}"
            )
        if row.defense in DEFENSES and DEFENSES[row.defense].labels and row.labels == "none":
            raise SettingsError(f"{grid.name}: {row.name} needs labels, given or pseudo")
    if not grid.seeds or min(grid.seeds) < 0 or len(set(grid.seeds)) < len(grid.seeds):
        raise SettingsError(
            f"{grid.name}: seeds are different whole numbers from 0, got {grid.seeds}"
        )
    if len(set(grid.attacks)) < len(grid.attacks):
        raise SettingsError(f"{grid.name}: an attack is there twice: {', '.join(grid.attacks)}")
    if grid.victim_seed is not None and grid.victim_seed < 0:
        raise SettingsError(f"{grid.name}: victim_seed is 0 or more, got {grid.victim_seed}")


def _own_defaults(defense: str, where: str) -> Any:
    """Return the default settings of a defense that is a function in a file."""
    code = own_hash(defense)
    if not code:
        file = defense.rpartition(":")[0]
        raise SettingsError(f"{where}: {file}: no such file; defense is a name or {OWN}")
    try:
        return _run_own(defense, code)
    except ArchitectureError as error:
        raise SettingsError(f"{where}: {error}") from error


@cache
def _run_own(defense: str, code: str) -> Any:
    """Run a file once for each hash of it."""
    return find_defense(defense).settings


def _beside(path: Path, place: str) -> str:
    """Return a relative path in a grid file as one from here."""
    scheme, colon, rest = place.rpartition(":")
    if not rest or place in SCHEMES or at_home(rest).is_absolute():
        return place
    return f"{scheme}{colon}{path.parent / rest}"
