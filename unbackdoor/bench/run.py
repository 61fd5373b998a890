"""Run cells: find or train the victim, defend it, score it before and after, write the record."""

import copy
import json
import os
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from unbackdoor.attacks.named import attack_from_record, named_attack
from unbackdoor.attacks.poisoning import Attack
from unbackdoor.backbones import Backbone, Loaded, network_state
from unbackdoor.bench.cells import (
    CBD,
    CLEAN,
    NO_DEFENSE,
    Cell,
    Pairs,
    Victim,
    as_record,
    describe,
)
from unbackdoor.bench.detection import detect_cell
from unbackdoor.bench.features import cell_features, cell_images
from unbackdoor.bench.grid import data_name, find_own, settings_of
from unbackdoor.bench.obtain import (
    Place,
    load_sets,
    obtain_victim,
    open_victim,
    size_of,
    source_of,
)
from unbackdoor.bench.store import (
    SCHEMA,
    SCORING,
    Store,
    claimed,
    drop_victim,
    read_record,
    write_failure,
    write_json,
    write_record,
)
from unbackdoor.cbd import PurifyState, purify
from unbackdoor.checkpoint import Tree, write_tensors
from unbackdoor.data import LabeledImages, Sets, from_tensor
from unbackdoor.defense_jobs import find_defense, label, pseudo_label_accuracy, run_defense
from unbackdoor.defenses import DEFENSES
from unbackdoor.defenses.keeping import Keeper
from unbackdoor.devices import (
    Precision,
    describe_device,
    forget_peak,
    laid_out,
    peak_memory,
    pick_device,
    pick_precision,
)
from unbackdoor.evaluation import (
    Known,
    counts,
    divide,
    doubts_of_seed,
    known_from,
    read_split,
    reading_record,
    unread_head,
)
from unbackdoor.metrics import Reading
from unbackdoor.outputs import TrainedFiles, versions
from unbackdoor.resume import find_state, identity, save_state
from unbackdoor.roles import defender_rows
from unbackdoor.types import OnStep, Say
from unbackdoor.values import nested


class Repaired(NamedTuple):
    """What a defense made, as far as JSON can hold it, beside the backbone."""

    backbone: Backbone
    log: dict[str, Any]
    history: list[dict[str, float]]
    told: dict[str, Any]  # of the images and labels that the defense was given
    seconds: float = 0.0  # that the defense took, in runs that were killed as well


class Shared(NamedTuple):
    """What the cells of one victim need not do twice.

    Attributes:
        load: Loads images, and remembers what it has loaded.
        hashes: Of the images, as a record holds them; remembers them likewise.
        before: Scores of the victim as delivered, so far, by attack, its options and seed.
        repairs: So far, see :func:`repair_key`.
    """

    load: Callable[[str, int], Sets]
    hashes: Callable[[str, int], dict[str, str]]
    before: dict[tuple[str, Pairs, int], Reading]
    repairs: dict[str, Repaired]


class Tally(NamedTuple):
    """How a run over some cells ended."""

    done: int = 0
    failed: int = 0
    left: int = 0  # to others who are at work on them


def run_cells(
    cells: Iterable[Cell],
    store: Store,
    place: Place,
    *,
    say: Say = print,
    on_step: OnStep | None = None,
) -> Tally:
    """Run those of ``cells`` that have no record, one victim after the other.

    A cell that fails is recorded with its error, and the rest go on; it is run again only after
    ``forget_failures``. Cells of a victim that somebody else is at work on are left to them.
    Whatever is killed goes on after its last finished epoch; a detector goes on after its last
    state, and what it is trained on is not repaired again.
    """
    load = cache(load_sets)
    tally = Tally()
    revision()
    for victim, group in by_victim(pending(cells, store)):
        with claimed(store, f"{victim.key}-cells") as mine:
            if not mine:
                tally = tally._replace(left=tally.left + len(group))
                continue
            _run_group(victim, group, store, place, load=load, say=say, on_step=on_step)
            done = sum(store.is_done(cell.key) for cell in group)
            left = len(pending(group, store))  # that others hold
            failed = len(group) - done - left
            tally = Tally(tally.done + done, tally.failed + failed, tally.left + left)
            drop_unneeded(store, place.drop)
    return tally


def draw_cells(
    cells: Iterable[Cell],
    store: Store,
    place: Place,
    *,
    say: Say = print,
    on_step: OnStep | None = None,
) -> int:
    """Keep what the report draws of those in ``place.features`` that have a record and lack it.

    Those whose features are lacking are repaired again; records stay as they are. Returns how many.

    Raises:
        UnbackdoorError: See ``errors``.
    """
    load, drawn = cache(load_sets), 0
    for cell in cells:
        path, images = store.features_path(cell.key), store.images_path(cell.key)
        has_all = path.is_file() and images.is_file()
        if cell.key not in place.features or has_all or not store.is_done(cell.key):
            continue
        with claimed(store, cell.key) as mine:
            if not mine:
                continue
            say(describe(cell))
            size = size_of(cell.victim)
            made = {**read_record(store.record_path(cell.key))["victim"], "size": size}
            attack = attack_of(cell, made)
            sets = load(place.data, size)
            split = divide(*sets, seed=cell.seed)
            if not path.is_file():  # else the victim's weights, which may be gone, are not needed
                found = obtain_victim(
                    cell.victim, store, place, load=load, say=say, on_step=on_step
                )
                loaded = open_victim(found, json.loads(found.record.read_text()))
                repaired = repair(cell, loaded, sets.train, store, place, on_step=on_step)
                kept = cell_features(loaded.backbone, repaired.backbone, split, attack, cell)
                write_json(path, kept, indent=None)
                store.state_path(repair_key(cell)).unlink(missing_ok=True)
            write_json(images, cell_images(split, attack), indent=None)
            drawn += 1
    return drawn


def drop_unneeded(store: Store, needed: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Delete the weights of those victims of which all cells are done or have failed.

    Args:
        needed: Keys of victims, each with those of all cells that need it.
    """
    for victim, keys in needed:
        if all(store.is_done(key) or store.error_of(key) is not None for key in keys):
            drop_victim(store, victim)


def pending(cells: Iterable[Cell], store: Store) -> list[Cell]:
    """Return the cells with neither a record nor a failure."""
    unique = {cell.key: cell for cell in cells}
    return [
        cell
        for key, cell in unique.items()
        if not store.is_done(key) and store.error_of(key) is None
    ]


def repair_key(cell: Cell) -> str:
    """Return what cells that share a repair have in common; a clean victim's have many attacks."""
    return replace(cell, attack="", planted=(), detection=None).key


def by_victim(cells: Iterable[Cell]) -> list[tuple[Victim, list[Cell]]]:
    """Group cells by their victim, in order: one group is one job."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.victim.key, []).append(cell)
    return [(group[0].victim, group) for group in groups.values()]


def _run_group(
    victim: Victim,
    cells: Sequence[Cell],
    store: Store,
    place: Place,
    *,
    load: Callable[[str, int], Sets],
    say: Say,
    on_step: OnStep | None,
) -> None:
    """Run the cells of one victim."""
    shared = Shared(load, cache(partial(_hashes, load)), {}, {})
    found: TrainedFiles | None = None
    for cell in cells:
        with claimed(store, cell.key) as mine:
            if not mine or not pending([cell], store):
                continue
            say(describe(cell))
            try:
                found = found or obtain_victim(
                    victim, store, place, load=load, say=say, on_step=on_step
                )
            except Exception as error:  # other victims may be had
                for other in pending(cells, store):
                    _fail(other, error, store, say)
                break
            try:
                record = run_cell(cell, found, store, place, shared, say=say, on_step=on_step)
                write_record(store, cell.key, record)
                if not any(
                    repair_key(other) == repair_key(cell) for other in pending(cells, store)
                ):
                    store.state_path(repair_key(cell)).unlink(missing_ok=True)
            except Exception as error:  # a failed cell must not stop the others
                _fail(cell, error, store, say)


def _hashes(load: Callable[[str, int], Sets], data: str, size: int) -> dict[str, str]:
    sets = load(data, size)
    return {
        "train_sha256": from_tensor(sets.train.images).fingerprint,
        "test_sha256": from_tensor(sets.test.images).fingerprint,
    }


def _fail(cell: Cell, error: Exception, store: Store, say: Say) -> None:
    text = f"{type(error).__name__}: {error}"
    path = write_failure(
        store, cell.key, describe(cell), text, "".join(traceback.format_exception(error))
    )
    say(f"failed: {text} (where: {path})")


def defender_images(train: LabeledImages, cell: Cell) -> LabeledImages:
    """Return what a defense has, see ``defender_rows``, with the true classes.

    Raises:
        DataError: If the share is too large or too small.
    """
    given = cell.labels == "given"
    taken = defender_rows(len(train.labels), labeled=given, share=cell.share, seed=cell.seed)
    return train.take(taken)


def run_cell(
    cell: Cell,
    found: TrainedFiles,
    store: Store,
    place: Place,
    shared: Shared,
    *,
    say: Say,
    on_step: OnStep | None,
) -> dict[str, Any]:
    """Defend and score one victim, and train and score the cell's detector; returns the record.

    Raises:
        UnbackdoorError: See ``errors``.
    """
    made = json.loads(found.record.read_text())
    record = _read_defended(cell, store, made)
    if record is None:
        record, backbone = defend_cell(cell, found, store, place, shared, on_step=on_step)
        if cell.detection is None:
            return record
        tree: Tree = {k: v.cpu().contiguous() for k, v in network_state(backbone).items()}
        path = store.backbone_path(cell.key)
        write_tensors(path, tree, metadata={"format": "pt"}, overwrite=True)
        write_json(store.defended_path(cell.key), record)
    source = source_of(store.backbone_path(cell.key), made)
    attack = attack_of(cell, made)
    known = known_from(made, attack, cell.attack)
    detection = detect_cell(cell, source, known, store, place, say=say, on_step=on_step)
    detection["revision"] = revision()
    seconds = record["seconds"]
    everything = round(seconds["all"] + sum(detection["seconds"].values()), 1)
    return {**record, "seconds": {**seconds, "all": everything}, "detection": detection}


def defend_cell(
    cell: Cell,
    found: TrainedFiles,
    store: Store,
    place: Place,
    shared: Shared,
    *,
    on_step: OnStep | None,
) -> tuple[dict[str, Any], Backbone]:
    """Defend and score one victim; returns the record but for a detector, and the backbone.

    Raises:
        UnbackdoorError: See ``errors``.
    """
    started, device = time.monotonic(), pick_device(place.device)
    forget_peak(device)
    made = json.loads(found.record.read_text())
    loaded = open_victim(found, made)
    sets = shared.load(place.data, loaded.size)
    split = divide(*sets, seed=cell.seed)
    attack = attack_of(cell, made)
    as_delivered = cell.attack, cell.planted, cell.seed
    if as_delivered not in shared.before:
        victim = laid_out(copy.deepcopy(loaded.backbone).to(device))
        shared.before[as_delivered] = read_split(victim, split, attack, durable=True)
    alike = repair_key(cell)
    if alike not in shared.repairs:
        begun = time.monotonic()
        result = repair(cell, loaded, sets.train, store, place, on_step=on_step)
        started -= result.seconds
        spent = result.seconds + time.monotonic() - begun
        shared.repairs[alike] = result._replace(seconds=spent)
    repaired = shared.repairs[alike]
    seconds = {"defense": repaired.seconds}
    reading = delivered = shared.before[as_delivered]
    if cell.defense != NO_DEFENSE:
        backbone = laid_out(repaired.backbone.to(device))
        reading = read_split(backbone, split, attack, durable=True)
    if cell.key in place.features:
        kept = cell_features(loaded.backbone, repaired.backbone, split, attack, cell)
        write_json(store.features_path(cell.key), kept, indent=None)
        write_json(store.images_path(cell.key), cell_images(split, attack), indent=None)
    seconds["all"] = time.monotonic() - started
    record = {
        "schema": SCHEMA,
        "scoring": SCORING,
        "key": cell.key,
        "cell": as_record(cell),
        "victim": _describe_found(found, made, cell),
        "scores": {"before": reading_record(delivered), "after": reading_record(reading)},
        "log": repaired.log,
        "history": repaired.history,
        "told": repaired.told,
        "data": {
            "name": data_name(place.data),
            **shared.hashes(place.data, loaded.size),
            **counts(split),
        },
        "flags": [
            *unread_head(repaired.backbone, reading, classes=len(split.test.classes)),
            *flags_of(cell, known_from(made, attack, cell.attack), reading, split.probe),
        ],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_memory": peak_memory(device),
        "device": describe_device(device),
        "precision": method_precision(place) if cell.defense == CBD else "fp32",
        "revision": revision(),
        "versions": versions(),
    }
    return record, repaired.backbone


def attack_of(cell: Cell, made: Mapping[str, Any]) -> Attack:
    """Return what a cell is scored under: for a poisoned victim, what its record says was planted.

    Args:
        made: The record of the victim.
    """
    if cell.victim.attack != CLEAN:
        return attack_from_record(made["attack"])
    options = {"target": cell.victim.target, **nested(cell.planted)}
    training = cell.victim.training
    return named_attack(cell.attack, size=made["size"], training=training, options=options)


def repair(
    cell: Cell,
    loaded: Loaded,
    train: LabeledImages,
    store: Store,
    place: Place,
    *,
    on_step: OnStep | None,
) -> Repaired:
    """Run the defense of a cell, or go on with it; the seconds are those of earlier runs."""
    if cell.defense == NO_DEFENSE:
        return Repaired(loaded.backbone, {}, [], {"labels": "none", "images": 0})
    device = pick_device(place.device)
    pool = defender_images(train, cell)
    told: dict[str, Any] = {
        "labels": cell.labels,
        "images": len(pool.labels),
        "fingerprint": from_tensor(pool.images).fingerprint,
    }
    if cell.defense == CBD:
        return _purify(cell, loaded, pool, store, place, told=told, on_step=on_step)
    backbone = loaded.backbone.to(device)
    data = label(backbone, pool.images, pool.labels, cell.labels)
    if cell.labels == "pseudo":
        told["pseudo_label_accuracy"] = pseudo_label_accuracy(data, pool.labels, cell.labels)
    chosen = find_defense(find_own(cell, place.own), seed=cell.seed)
    chosen = chosen._replace(settings=settings_of(cell, chosen.settings))
    of = {
        "defense": json.dumps([cell.defense, cell.code, cell.settings, cell.labels]),
        "checkpoint": loaded.checkpoint.sha256,
        "images": told["fingerprint"],
        "device": str(device),
    }
    keep = Keeper(store.state_path(repair_key(cell)), of)
    result = run_defense(chosen, backbone, data, device=device, on_step=on_step, keep=keep)
    return Repaired(result.backbone, result.log, [], told, keep.earlier)


def method_precision(place: Place) -> Precision:
    """Return what the method computes in: as the baselines beside it, unless asked otherwise."""
    asked = place.precision
    return "fp32" if asked == "auto" else pick_precision(asked, pick_device(place.device))


def _purify(
    cell: Cell,
    loaded: Loaded,
    pool: LabeledImages,
    store: Store,
    place: Place,
    *,
    told: dict[str, Any],
    on_step: OnStep | None,
) -> Repaired:
    device = pick_device(place.device)
    precision = method_precision(place)
    settings, path = settings_of(cell), store.state_path(repair_key(cell))
    of = identity(settings, checkpoint=loaded.checkpoint.sha256, images=told["fingerprint"])
    of |= {"device": str(device), "precision": precision}

    state = find_state(path, of)  # none where it is of another device, or damaged
    earlier = sum(epoch.seconds for epoch in state.history) if state else 0.0

    def on_epoch(reached: PurifyState) -> None:
        save_state(path, reached, of)

    backbone, history = purify(
        loaded.backbone,
        pool.images,
        settings,
        device=device,
        precision=precision,
        state=state,
        on_step=on_step,
        on_epoch=on_epoch,
    )
    epochs = [epoch._asdict() for epoch in history]
    return Repaired(cast("Backbone", backbone), {}, epochs, told, earlier)


def flags_of(cell: Cell, known: Known, reading: Reading, probe: LabeledImages) -> list[str]:
    """Return why the scores of a cell should be read with care.

    Args:
        probe: The images that the probe is trained on.
    """
    found = doubts_of_seed(known, reading, probe)
    free = cell.defense == CBD or (cell.defense in DEFENSES and not DEFENSES[cell.defense].labels)
    if free and cell.labels != "none":
        found.append("a label-free method was given labels")
    return found


@cache
def revision() -> str | None:
    """Return the git revision of this package's checkout, with a mark if files differed from it.

    Read once, when cells begin to run: what is changed meanwhile is not what runs. Of a copy
    without its repository it is what UNBACKDOOR_REVISION says.
    """
    git, folder = shutil.which("git"), Path(__file__).resolve().parent
    told = os.environ.get("UNBACKDOOR_REVISION") or None
    if git is None:
        return told

    def answer(*words: str) -> str | None:
        run = subprocess.run(
            [git, "-C", str(folder), *words], capture_output=True, text=True, check=False
        )
        return run.stdout.strip() if run.returncode == 0 else None

    head = answer("rev-parse", "HEAD")
    if head is None:
        return told
    return f"{head}-changed" if answer("status", "--porcelain", "--", "..") else head


def _read_defended(cell: Cell, store: Store, made: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of a defended cell whose detector a run that was killed has not scored."""
    paths = store.defended_path(cell.key), store.backbone_path(cell.key)
    if not all(path.is_file() for path in paths):
        return None
    record: dict[str, Any] = json.loads(paths[0].read_text())
    current = record["schema"] == SCHEMA and record["victim"]["sha256"] == made["sha256"]
    return record if current else None


def _describe_found(found: TrainedFiles, made: dict[str, Any], cell: Cell) -> dict[str, Any]:
    kept = {name: made.get(name) for name in ("attack", "scores", "seconds", "speed", "device")}
    if cell.victim.attack == CLEAN:
        kept["scores"] = None  # under every attack; this cell's own are below
    return {"key": cell.victim.key, "name": found.tensors.name, "sha256": made["sha256"], **kept}
