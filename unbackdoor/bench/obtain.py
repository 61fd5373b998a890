"""Where victims come from: the package, a folder, or a training, which may be somebody else's."""

import importlib.resources
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unbackdoor.attack_jobs import make_victim, surrogate_augment
from unbackdoor.attacks.named import attack_record, is_adversarial, named_attack
from unbackdoor.backbones import Loaded, Source, build, open_backbone
from unbackdoor.bench.cells import CLEAN, DEMO, Victim
from unbackdoor.bench.grid import IMAGENET100, data_name, file_hash
from unbackdoor.bench.store import Store, claimed
from unbackdoor.checkpoint import sha256_of
from unbackdoor.data import Sets, draw_rows, from_tensor, load_both, load_labeled
from unbackdoor.errors import CheckpointError, DataError, OutputError, SettingsError
from unbackdoor.evaluation import read_victim
from unbackdoor.outputs import TrainedFiles, name_trained
from unbackdoor.resume import go_on
from unbackdoor.settings import SCHEMES, DeviceName, PrecisionName, at_home
from unbackdoor.types import OnStep, Say
from unbackdoor.values import nested

EMBEDDED_TRAIN, EMBEDDED_TEST = 4_000, 200  # of the 5,000 that come with the package
WAIT = 5.0  # seconds between looks at a victim that somebody else trains


class Place(NamedTuple):
    """Where things are and how to compute; names no result, so it is part of no key."""

    data: str  # see ``load_labeled``
    victims: str = ""  # a folder where victims may lie already
    device: DeviceName = "auto"
    precision: PrecisionName = "auto"
    # Keys of victims, each with those of all cells that need it: after them, weights are deleted.
    drop: tuple[tuple[str, tuple[str, ...]], ...] = ()
    features: tuple[str, ...] = ()  # keys of cells whose features shall be kept for the report
    detection: str = ""  # see ``load_voc``; for cells with a detector
    pictures: tuple[str, ...] = ()  # keys of cells whose detections shall be kept for the report
    start: str = ""  # the checkpoint that victims are trained on from
    own: tuple[str, ...] = ()  # defenses that are functions in files, as path/to/file.py:function


def for_any_folder(place: Place) -> Place:
    """Return ``place`` with absolute paths, for processes that run in other folders."""

    def absolute(path: str) -> str:
        return str(at_home(path).absolute())

    def source(text: str) -> str:
        if text in ("", *SCHEMES):
            return text
        scheme, colon, path = ("", "", text) if Path(text).exists() else text.rpartition(":")
        return f"{scheme}{colon}{absolute(path)}"

    own = (defense.rpartition(":") for defense in place.own)
    return place._replace(
        data=source(place.data),
        victims=source(place.victims),
        detection=source(place.detection),
        start=source(place.start),
        own=tuple(f"{absolute(file)}:{name}" for file, _, name in own),
    )


def load_sets(data: str, size: int) -> Sets:
    """Load training and test images; errors are those of ``load_labeled``.

    The images that come with the package are all test images; here they are divided in two.

    Raises:
        DataError: Also if what is called imagenet100 has other classes.
    """
    if data != "fashion-mnist":
        sets = load_both(data, size=size)
        if data_name(data) == IMAGENET100:
            check_imagenet100(data, sets.train.classes)
        return sets
    both = load_labeled(data, split="test", size=size)
    cut, end = EMBEDDED_TRAIN, EMBEDDED_TRAIN + EMBEDDED_TEST
    return Sets(both.take(slice(cut)), both.take(slice(cut, end)))


def check_imagenet100(data: str, classes: Sequence[str]) -> None:
    """Check that these are the classes of Tian et al. 2020, as far as their names tell.

    Shards number their classes; then there have to be as many.

    Raises:
        DataError: If they are not.
    """
    text = importlib.resources.files("unbackdoor.bench") / "imagenet100.txt"
    wanted = text.read_text("utf-8").split()
    numbered = not any(re.fullmatch(r"n\d{8}", name) for name in classes)
    lacking = [] if numbered else sorted(set(wanted) - set(classes))
    if len(classes) == len(wanted) and not lacking:
        return
    such = f", and lacks {len(lacking)} of ImageNet-100's, such as {lacking[0]}" if lacking else ""
    raise DataError(
        f"{data}: has {len(classes)} classes{such}; docs/benchmark.md makes a folder of the right "
        "ones, and a folder of another name may hold any"
    )


def obtain_victim(
    victim: Victim,
    store: Store,
    place: Place,
    *,
    load: Callable[[str, int], Sets],
    say: Say,
    on_step: OnStep | None,
) -> TrainedFiles:
    """Return the files of a victim; it is trained if it is nowhere yet.

    Raises:
        UnbackdoorError: If it cannot be trained.
    """
    found = find_victim(victim, store, place, load=load, say=say)
    trained_here = place._replace(victims="")  # what is given has been looked at
    while found is None:
        with claimed(store, victim.key) as mine:
            found = find_victim(victim, store, trained_here, load=load, say=say)  # by others
            if mine and found is None:
                surrogate = None
                if clean := surrogate_of(victim):
                    surrogate = obtain_victim(
                        clean, store, place, load=load, say=say, on_step=on_step
                    ).tensors
                sets = load(place.data, size_of(victim))
                _train(victim, store, place, sets, surrogate=surrogate, say=say, on_step=on_step)
                found = find_victim(victim, store, trained_here, load=load, say=say)
                if found is None:
                    raise OutputError(f"{victim.stem}: its training left no victim of this grid")
        if found is None:
            time.sleep(WAIT)
    return found


def surrogate_of(victim: Victim) -> Victim | None:
    """Return the clean victim that CLA perturbs its images by; None for most attacks."""
    if not is_adversarial(victim.attack) or victim.settings is None:
        return None
    size = size_of(victim)
    settings = replace(victim.settings, augment=surrogate_augment(size))
    return replace(victim, attack=CLEAN, settings=settings, planted=())


def options_of(victim: Victim) -> dict[str, Any]:
    """Return the options of a victim's attack, as ``named_attack`` takes them."""
    return {"target": victim.target, **nested(victim.planted)}


def size_of(victim: Victim) -> int:
    """Return the side of a victim's images in pixels."""
    return victim.size or _own_size(victim.arch)


@cache
def _own_size(arch: str) -> int:
    return build(arch).size or 0  # a grid takes no network that does not say


def victim_files(victim: Victim, folder: Path) -> TrainedFiles:
    """Return the names of a victim's files in ``folder``."""
    return name_trained(folder / f"{victim.stem}.safetensors")


def find_victim(
    victim: Victim, store: Store, place: Place, *, load: Callable[[str, int], Sets], say: Say
) -> TrainedFiles | None:
    """Return the files of a victim that is there: with the package, given, or trained before."""
    if victim.settings is None:
        return _shipped(victim)
    folders = [store.victim_folder(victim.key)]
    if place.victims:
        folders.append(Path(place.victims))
    for folder in folders:
        found = victim_files(victim, folder)
        if not (found.tensors.is_file() and found.record.is_file()):
            continue
        try:
            made = dict(read_victim(str(found.record)))
        except CheckpointError:
            made = {}
        why: str | None = "its record is damaged"
        if _is_whole(made):
            why = why_not(victim, made, place, load=load)
        if why is None and made["sha256"] != sha256_of(found.tensors):
            why = "its weights are not those of its record"
        if why:
            say(f"{found.tensors}: not used, for {why}")
            continue
        return found
    return None


def _is_whole(made: dict[str, Any]) -> bool:
    """Tell whether a victim's record has what it is judged by."""
    attack = made.get("attack") or {"name": CLEAN, "target": 0}
    try:
        _ = attack["name"], attack["target"], made["size"], made["data"]["sha256"], made["sha256"]
    except (KeyError, TypeError):
        return False
    return True


def why_not(
    victim: Victim, made: dict[str, Any], place: Place, *, load: Callable[[str, int], Sets]
) -> str | None:
    """Return why a victim's record does not describe ``victim``; None if it does."""
    settings = victim.settings
    if settings is None:
        return "its training is not known"
    wanted = json.loads(json.dumps({"kind": victim.training, **asdict(settings)}))
    if made.get("training") != wanted:
        return "it was trained with other settings"
    if (made.get("start") or "") != victim.start:
        return "it was trained on from other weights"
    if made.get("arch") != victim.arch or (victim.size and made.get("size") != victim.size):
        return "it is another network"
    attack = made.get("attack") or {"name": CLEAN, "target": victim.target}
    if (attack["name"], attack["target"]) != (victim.attack, victim.target):
        return "it has another attack"
    if victim.attack != CLEAN:
        poisoning = named_attack(
            victim.attack,
            size=made["size"],
            training=victim.training,
            options=options_of(victim),
        )
        wanted = json.loads(json.dumps(attack_record(poisoning)))
        # older records have no PGD, which has no setting
        if any(attack.get(name) != value for name, value in wanted.items() if name != "pgd"):
            return "it was poisoned otherwise"
    images = load(place.data, made["size"]).train.images
    if settings.limit:
        images = images[torch.from_numpy(draw_rows(len(images), settings.limit, seed=victim.seed))]
    if made["data"]["sha256"] != from_tensor(images).fingerprint:
        return "it was trained on other images"
    return None


def _shipped(victim: Victim) -> TrainedFiles:
    assets = Path(str(importlib.resources.files("unbackdoor") / "assets"))
    found = name_trained(assets / f"{DEMO}_victim.safetensors")
    made = json.loads(found.record.read_text())
    if (made["attack"]["name"], made["arch"]) != (victim.attack, victim.arch):
        raise SettingsError(
            f"the victim that comes with the package is {made['attack']['name']} on "
            f"{made['arch']}, not {victim.attack} on {victim.arch}"
        )
    return found


def _train(
    victim: Victim,
    store: Store,
    place: Place,
    sets: Sets,
    *,
    surrogate: Path | None,
    say: Say,
    on_step: OnStep | None,
) -> None:
    if victim.settings is None or victim.data != data_name(place.data):
        raise SettingsError(f"a victim of {victim.data} cannot be trained on {place.data}")
    if victim.start and file_hash(place.start) != victim.start:
        raise SettingsError(f"{place.start} is not what it was when the grid was read; start again")
    folder = store.victim_folder(victim.key)
    files = victim_files(victim, folder)
    train = partial(
        make_victim,
        victim.attack,
        place.data,
        victim.arch,
        folder,
        victim.settings,
        training=victim.training,
        options=options_of(victim),
        surrogate=surrogate,
        start=Path(place.start) if victim.start else None,
        size=victim.size or None,
        sets=sets,
        device=place.device,
        precision=place.precision,
        say=say,
        on_step=on_step,
    )
    files.record.unlink(missing_ok=True)  # of weights that are no longer there
    go_on(train, files.state, say=say)


def open_victim(found: TrainedFiles, made: dict[str, Any]) -> Loaded:
    """Open the checkpoint of a victim as its record says."""
    return open_backbone(source_of(found.tensors, made))


def source_of(checkpoint: Path, made: dict[str, Any]) -> Source:
    """Return how to read the tensors of a victim, or of what a defense made of it.

    Args:
        made: The victim's record.
    """
    mean, std = tuple(made["mean"]), tuple(made["std"])
    return Source(checkpoint, made["arch"], mean, std, made.get("size"))
