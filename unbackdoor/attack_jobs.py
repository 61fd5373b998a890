"""Make a victim: everything around its training, from the data to the file and its record."""

import copy
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor.attacks.named import (
    ATTACKS,
    SMALL,
    Training,
    attack_record,
    is_adversarial,
    named_attack,
)
from unbackdoor.attacks.poisoning import (
    Attack,
    PoisonedSet,
    adversarial_images,
    count_poisoned,
    poison,
)
from unbackdoor.backbones import (
    Architecture,
    Backbone,
    Classifier,
    Loaded,
    Pixels,
    Source,
    build,
    network_state,
    open_backbone,
    own_hash,
    public_name,
    settle_pixels,
    try_features,
    try_logits,
)
from unbackdoor.checkpoint import (
    check_output,
    refuse_inputs,
    sha256_of,
    write_text,
)
from unbackdoor.data import (
    LabeledImages,
    Sets,
    draw_rows,
    even_rows,
    from_tensor,
    load_both,
    load_images,
)
from unbackdoor.devices import (
    Precision,
    describe_device,
    deterministic,
    flops,
    forget_peak,
    matrix_limit,
    peak_memory,
    pick_device,
    pick_precision,
    told_of_memory,
)
from unbackdoor.errors import (
    ArchitectureError,
    CheckpointError,
    DataError,
    DivergedError,
    MismatchError,
    OutputError,
    SettingsError,
)
from unbackdoor.evaluation import (
    DEFINITIONS,
    Known,
    Split,
    divide,
    doubts,
    read_split,
    read_victim,
    reading_record,
    scores_table,
    unread_head,
)
from unbackdoor.metrics import Reading, find_goals
from unbackdoor.outputs import (
    TrainedFiles,
    name_trained,
    refuse_trained,
    versions,
    write_trained,
)
from unbackdoor.report import (
    Picture,
    amplified_difference,
    as_text,
    images_picture,
    render_report,
)
from unbackdoor.resume import as_texts, is_due, read_state, write_state
from unbackdoor.settings import DeviceName, PrecisionName, VictimSettings, in_range
from unbackdoor.types import Labels, OnStep, RawImages, Say
from unbackdoor.victims import Epoch, TrainingState, count_steps, train_simclr, train_supervised

CLEAN = "clean"  # the name of a victim that is none
SHOWN = 6  # images in a picture


class Speed(NamedTuple):
    """How fast a victim was trained."""

    images_per_second: float
    operations_per_image: float
    matrix_limit: float  # operations a second, in large matrix products
    share_of_limit: float


class Plan(NamedTuple):
    """A victim that can be made: everything has been checked, nothing is written yet."""

    name: str
    attack: Attack | None
    training: Training
    arch: str
    architecture: Architecture
    pixels: Pixels
    data: LabeledImages  # to train on
    rows: Tensor  # their numbers in the training set
    split: Split  # to score with
    scored: Mapping[str, Attack]  # by name, what the victim is scored under
    surrogate: Loaded | None  # a clean classifier, if one was given
    start: Loaded | None  # to train on, in place of new weights


def make_victim(
    name: str,
    data: str,
    arch: str,
    out: Path,
    settings: VictimSettings,
    *,
    training: Training = "supervised",
    options: Mapping[str, Any] | None = None,
    trigger: Mapping[str, str] | None = None,
    surrogate: Path | None = None,
    start: Path | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: int | None = None,
    sets: Sets | None = None,
    device: DeviceName = "auto",
    precision: PrecisionName = "auto",
    overwrite: bool = False,
    resume: bool = False,
    say: Say = print,
    on_step: OnStep | None = None,
) -> TrainedFiles:
    """Poison a training set, train a network on it, score it, and write it with its record.

    The files are ``NAME-TRAINING-seedN.safetensors`` and ``.json`` in ``out``, which is made if
    absent. The state of the training is kept beside them until the end.

    Args:
        name: One of the paper's attacks, or ``clean`` for a network that is never poisoned.
        data: A labeled set, see ``load_labeled``.
        arch: See ``build``.
        options: Attributes of the attack to replace, see ``Attack``.
        trigger: Attributes of its trigger to replace, as texts.
        surrogate: CLA's clean network, of the same architecture; without it one is made first, as
            a victim of its own in ``out``.
        start: A checkpoint of the same architecture, whose features are trained on in place of new
            weights. Heads are new.
        mean: Of the pixels, on the [0, 1] scale; the architecture's by default.
        std: Likewise.
        size: Side of the images in pixels; the architecture's by default.
        sets: What ``data`` holds at that size, from who has read it already.
        overwrite: Replace existing files and the state of an earlier run.
        resume: Continue from the state of an earlier run of the same victim.
        say: Receives what happens, line by line.
        on_step: Called after every step with the number of steps done and of all steps.

    Raises:
        UnbackdoorError: See ``errors``; nothing is written then but the state of finished epochs.
    """
    started = time.monotonic()
    files = plan_files(name, out, training, settings, overwrite=overwrite, resume=resume)
    for path in files:
        refuse_inputs(path, filter(None, (surrogate, start)))
    where = pick_device(device)
    forget_peak(where)
    how = pick_precision(precision, where)
    plan = plan_victim(
        name,
        data,
        arch,
        settings,
        training=training,
        options=options,
        trigger=trigger,
        surrogate=surrogate,
        start=start,
        mean=mean,
        std=std,
        size=size,
        sets=sets,
    )
    say(describe_plan(plan))
    if settings.warmup >= settings.epochs:
        say(
            f"the learning rate only rises: {settings.warmup} epochs of warm-up, {settings.epochs} "
            "in all; pass a smaller --warmup"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be made: {error.strerror}") from error
    from_state = resume
    if plan.attack is not None and plan.attack.adversarial and plan.surrogate is None:
        surrogate = _make_surrogate(
            plan,
            data,
            out,
            settings,
            device=device,
            precision=precision,
            overwrite=overwrite,
            resume=resume,
            say=say,
            on_step=on_step,
        )
        plan = plan._replace(surrogate=open_surrogate(surrogate, plan))
        from_state = resume and files.state.exists()
        if resume and not from_state:
            say("no epoch with this surrogate was kept, so the first begins")
    with told_of_memory(where):
        poisoned = poisoned_set(plan, settings, device=where)
        say(describe_shares(plan, poisoned))
        backbone, history, earlier = train_with_state(
            plan,
            poisoned,
            settings,
            files.state,
            device=where,
            precision=how,
            resume=from_state,
            say=say,
            on_step=on_step,
        )
        speed = measure_speed(
            backbone, plan, poisoned, settings, history, device=where, precision=how
        )
    say(
        f"{speed.images_per_second:.0f} images/s, {speed.share_of_limit:.0%} of the "
        f"{speed.matrix_limit / 1e12:.2f} TFLOP/s that this device reaches in matrix products"
    )
    with told_of_memory(where):
        scores = score_and_say(backbone, plan, say=say)
    record = {
        **describe_victim(plan, poisoned, settings, data=data),
        "history": [[round(loss, 4), round(seconds, 1)] for loss, seconds in history],
        **scores,
        "device": describe_device(where),
        "precision": how,
        "peak_memory": peak_memory(where),
        "speed": speed._asdict(),
        "seconds": round(time.monotonic() - started + earlier, 1),
        "versions": versions(),
    }
    write_trained(files, network_state(backbone), record, overwrite=overwrite or resume, say=say)
    return files


def attack_options(
    *,
    target: int | None,
    share: float | None,
    share_of_target: float | None,
    all_to_all: bool,
    noise: float | None,
) -> dict[str, Any]:
    """Return the attributes of an attack that are given, under their names in ``Attack``.

    Raises:
        SettingsError: If both shares are given.
    """
    if share is not None and share_of_target is not None:
        raise SettingsError("pass --share or --share-of-target, not both")
    options: dict[str, Any] = {"target": target, "share": share, "noise": noise}
    options = {name: value for name, value in options.items() if value is not None}
    if share is not None:
        options["share_of"] = "data"
    if share_of_target is not None:
        options |= {"share": share_of_target, "share_of": "target", "poisons": "target"}
        options["redrawn"] = False  # WaNet's rows are fixed then
    if all_to_all:
        options["goal"] = "all-to-all"
    return options


def plan_files(
    name: str,
    out: Path,
    training: Training,
    settings: VictimSettings,
    *,
    overwrite: bool,
    resume: bool,
) -> TrainedFiles:
    """Return the files to write, after all that could forbid writing them has been checked.

    Raises:
        OutputError: If one exists, or an interrupted run left its state, and neither ``overwrite``
            nor ``resume`` is given; or if ``out`` is a file, or may not be written to.
    """
    files = name_files(name, out, training, settings)
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; --out takes a folder")
    if out.exists() and not os.access(out, os.W_OK):
        raise OutputError(f"{out}: may not be written to; pass another --out")
    refuse_trained(files, overwrite=overwrite, resume=resume)
    return files


def name_files(name: str, out: Path, training: Training, settings: VictimSettings) -> TrainedFiles:
    """Return the names of all files of a victim."""
    return name_trained(out / f"{name}-{training}-seed{settings.seed}.safetensors")


def plan_victim(
    name: str,
    data: str,
    arch: str,
    settings: VictimSettings,
    *,
    training: Training,
    options: Mapping[str, Any] | None = None,
    trigger: Mapping[str, str] | None = None,
    surrogate: Path | None = None,
    start: Path | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: int | None = None,
    sets: Sets | None = None,
) -> Plan:
    """Load what a victim is made of, and check that it can be made.

    Raises:
        SettingsError: If there is no such attack, or an option is unknown or out of range.
        ArchitectureError: See ``build`` and ``try_features``; or if the network has another number
            of classes than the data.
        MismatchError: If the surrogate is of other classes.
        DataError: See ``load_labeled``, ``divide`` and ``count_poisoned``; or if the images are too
            small for a trigger, or do not fill one batch.
    """
    architecture = build(arch)
    pixels = settle_pixels(arch, architecture, mean=mean, std=std, size=size)
    side = pixels.size
    attack = None
    if name != CLEAN:
        attack = named_attack(name, size=side, training=training, options=options, trigger=trigger)
    elif trigger or set(options or {}) - {"target"}:
        raise SettingsError("a clean victim has no trigger and no share; pass --target at most")
    train, test = sets or load_both(data, size=side)
    split = divide(train, test, seed=settings.seed)
    if settings.limit > len(train.labels):
        raise DataError(f"limit is {settings.limit}, but {data} has {len(train.labels)} images")
    taken, rows = train, torch.arange(len(train.labels))
    if settings.limit:
        rows = torch.from_numpy(draw_rows(len(train.labels), settings.limit, seed=settings.seed))
        taken = train.take(rows)
    count_steps(len(taken.labels), settings)
    classes = len(train.classes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)  # for what `initialize` does not draw
        architecture = architecture._replace(network=build(arch, classes=classes).network)
    if attack is not None:
        count_poisoned(taken.labels, attack, classes=classes)
        scored = {name: attack}
    else:
        scored = attacks_of_clean(side, training, **(options or {}))
    for each in scored.values():
        find_goals(test.labels, each, classes=classes)
        each.trigger(test.images[:1])
    if training == "supervised" and not architecture.heads:
        raise SettingsError(
            f"{arch} has no head that is known: call its last layer fc, linear, head or "
            "classifier, or pass --simclr"
        )
    _try_network(architecture, pixels, arch=arch, classes=classes, training=training)
    begun = None if start is None else open_backbone(Source(start, arch, *pixels))
    plan = Plan(
        name, attack, training, arch, architecture, pixels, taken, rows, split, scored, None, begun
    )
    if surrogate is None:
        return plan
    if attack is None or not attack.adversarial:
        raise SettingsError(f"{name} needs no --surrogate, for it perturbs no image first")
    return plan._replace(surrogate=open_surrogate(surrogate, plan))


def _try_network(
    architecture: Architecture, pixels: Pixels, *, arch: str, classes: int, training: Training
) -> None:
    """Run a copy of the untrained network on two images, so that no training ends in its error."""
    network = copy.deepcopy(architecture.network)
    backbone = Backbone(network, architecture.heads, mean=pixels.mean, std=pixels.std).eval()
    try_features(backbone, arch=arch, size=pixels.size)
    if training == "simclr":
        return
    found = try_logits(backbone, arch=arch, size=pixels.size)
    if found != classes:
        raise ArchitectureError(
            f"{arch} tells {found} classes apart, the data have {classes}; a function of your own "
            "takes their number as its argument classes"
        )


def open_surrogate(path: Path, plan: Plan) -> Loaded:
    """Return the clean classifier in ``path``.

    Raises:
        UnbackdoorError: As ``open_backbone``; or if it is no classifier of the data's classes.
    """
    loaded = open_backbone(Source(path, plan.arch, *plan.pixels))
    backbone, classes = loaded.backbone, len(plan.data.classes)
    size = plan.pixels.size
    if not backbone.heads or try_logits(backbone, arch=plan.arch, size=size) != classes:
        raise MismatchError(
            f"{path}: a surrogate has a head for {classes} classes; pass another, or none"
        )
    return loaded


def poisoned_set(plan: Plan, settings: VictimSettings, *, device: torch.device) -> PoisonedSet:
    """Return the training set as the victim sees it; clean where batches are poisoned later."""
    images, labels, classes = plan.data
    nothing = torch.zeros(len(labels), dtype=torch.bool)
    if plan.attack is None or plan.attack.redrawn:
        return PoisonedSet(images, labels, nothing, nothing)
    generator = torch.Generator().manual_seed(settings.seed)
    perturb = None
    if plan.surrogate is not None:
        surrogate = plan.surrogate.backbone.requires_grad_(False)
        draws = torch.Generator(device).manual_seed(settings.seed)

        def perturb(raw: RawImages, truth: Labels) -> RawImages:
            network = Classifier(surrogate.to(device))
            with deterministic():
                found = adversarial_images(network, raw, truth, generator=draws)
            surrogate.cpu()  # the victim has the device to itself
            return found

    return poison(
        images, labels, plan.attack, classes=len(classes), generator=generator, perturb=perturb
    )


def train(
    plan: Plan,
    poisoned: PoisonedSet,
    settings: VictimSettings,
    *,
    device: torch.device,
    precision: Precision,
    state: TrainingState | None = None,
    on_step: OnStep | None = None,
    on_epoch: Callable[[TrainingState], None] | None = None,
) -> Backbone:
    """Train what ``plan`` says on ``poisoned``; data and network go to ``device``."""
    network, heads = plan.architecture.network, plan.architecture.heads
    mean, std, _ = plan.pixels
    images = poisoned.images.to(device)
    start = None
    if plan.start is not None:
        body = plan.start.backbone.body
        start = {f"body.{name}": value for name, value in body.state_dict().items()}
    if plan.training == "simclr":
        for name in heads:
            network.set_submodule(name, nn.Identity())
        backbone = Backbone(network, mean=mean, std=std)
        train_simclr(
            backbone,
            images,
            settings,
            start=start,
            precision=precision,
            state=state,
            on_step=on_step,
            on_epoch=on_epoch,
        )
        return backbone
    redrawn = plan.attack if plan.attack is not None and plan.attack.redrawn else None
    train_supervised(
        Backbone(network, mean=mean, std=std),  # heads left in: logits
        images,
        poisoned.labels.to(device),
        settings,
        attack=redrawn,
        classes=len(plan.data.classes),
        start=start,
        precision=precision,
        state=state,
        on_step=on_step,
        on_epoch=on_epoch,
    )
    return Backbone(network, heads, mean=mean, std=std).to(device).eval()


def train_with_state(
    plan: Plan,
    poisoned: PoisonedSet,
    settings: VictimSettings,
    path: Path,
    *,
    device: torch.device,
    precision: Precision,
    resume: bool,
    say: Say,
    on_step: OnStep | None,
) -> tuple[Backbone, tuple[Epoch, ...], float]:
    """Train, say how it goes, and keep the state in ``path`` about once a minute and at the end.

    Returns:
        The trained backbone, the history of its epochs, and the seconds of those of earlier runs.

    Raises:
        OutputError: If ``resume`` is given and the state is missing or of another run.
    """
    of = {
        "name": plan.name,
        "arch": plan.arch,
        "code": own_hash(plan.arch),
        "training": plan.training,
        "device": str(device),
        "precision": precision,
        "pixels": json.dumps(plan.pixels),
        # As they were: a device may compute CLA's images a little differently the next time.
        "images": from_tensor(plan.data.images).fingerprint,
        "labels": hashlib.sha256(plan.data.labels.numpy().data).hexdigest(),
        "attack": json.dumps(None if plan.attack is None else attack_record(plan.attack)),
        "surrogate": "" if plan.surrogate is None else plan.surrogate.checkpoint.sha256,
        "start": "" if plan.start is None else plan.start.checkpoint.sha256,
        **as_texts(settings),
    }
    state = _load(path, of) if resume else None
    history = () if state is None else state.history
    earlier = sum(epoch.seconds for epoch in history)
    if state is None:
        path.unlink(missing_ok=True)  # of another run, which is being overwritten
    else:
        say(f"resuming after epoch {len(history)} of {settings.epochs}")
    kept_at = time.monotonic()

    def on_epoch(reached: TrainingState) -> None:
        nonlocal kept_at, history
        history = reached.history
        loss, seconds = history[-1]
        say(f"epoch {len(history)}/{settings.epochs}  loss {loss:.3f}  {seconds:.1f} s")
        if is_due(kept_at) or len(history) == settings.epochs:
            _save(path, reached, of)
            kept_at = time.monotonic()

    backbone = train(
        plan,
        poisoned,
        settings,
        device=device,
        precision=precision,
        state=state,
        on_step=on_step,
        on_epoch=on_epoch,
    )
    return backbone, history, earlier


def attacks_of_clean(
    size: int, training: Training, *, target: int = Attack.target
) -> dict[str, Attack]:
    """Return what a clean victim is scored under: every attack.

    Its scores are the ceiling that a repaired victim's PA and ASR are read against.
    """
    found: dict[str, Attack] = {}
    for name in ATTACKS:
        if training == "simclr" and is_adversarial(name):
            continue
        attack = named_attack(name, size=size, training=training, options={"target": target})
        if attack.trigger not in [other.trigger for other in found.values()]:  # CLA has BadNets'
            found[name] = attack
    return found


def score_and_say(backbone: Backbone, plan: Plan, *, say: Say) -> dict[str, Any]:
    """Score a victim under its attack, a clean one under every attack, and say how it does.

    Returns:
        Its scores and the doubts about them, as a record holds them.

    Raises:
        DivergedError: If the network has no finite features or logits.
    """
    say("scoring")
    try:
        readings = {
            attack: read_split(backbone, plan.split, each, durable=False)
            for attack, each in plan.scored.items()
        }
    except CheckpointError as error:
        raise DivergedError(
            f"the trained network cannot be scored: {error}; start again with --force and a "
            "smaller --learning-rate"
        ) from error
    for attack, reading in readings.items():
        say("\n".join(as_text(scores_table(reading, title=f"Scores under {attack}, percent"))))
    say(f"{DEFINITIONS} Probe and neighbours: {len(plan.split.probe.labels)} labeled images.")
    first = next(iter(readings.values()))
    say(f"{first.probe.images} test images, {first.probe.triggered} of them triggered as well")
    flags = victim_doubts(plan, backbone, first)
    for flag in flags:
        say(f"doubt: {flag}")
    records = {attack: reading_record(reading) for attack, reading in readings.items()}
    return {"scores": records if plan.attack is None else records[plan.name], "flags": flags}


def victim_doubts(plan: Plan, backbone: Backbone, reading: Reading) -> list[str]:
    """Return why the scores of this victim should be read with care, or why it may be none."""
    attack, supervised = next(iter(plan.scored.values())), plan.training == "supervised"
    known = Known(attack, plan.name, supervised)
    if plan.attack is not None:
        known = known._replace(
            victim_asr=None if reading.head is None else reading.head.asr,
            victim_loss=reading.probe.acc - reading.probe.pa,
            victim_acc=None if reading.head is None else reading.head.acc,
        )
    unread = unread_head(backbone, reading, classes=len(plan.data.classes))
    return unread + doubts(known, reading, plan.split.probe)


def describe_plan(plan: Plan) -> str:
    """Return one line about what will be trained on what."""
    what = "no attack" if plan.attack is None else str(plan.attack.trigger)
    return (
        f"{plan.name}: {what}; {plan.training}, {plan.arch}, {len(plan.data.labels)} images of "
        f"{len(plan.data.classes)} classes, {plan.pixels.size} × {plan.pixels.size}"
    )


def describe_shares(plan: Plan, poisoned: PoisonedSet) -> str:
    """Return one line about how much is poisoned, of all images and of those of the target."""
    attack, labels = plan.attack, poisoned.labels
    if attack is None:
        return "nothing is poisoned"
    if attack.redrawn:
        of_target = _redrawn_share_of_target(plan)
        target = "" if of_target is None else f", {of_target:.2%} of those labeled as the target"
        noise = f", and {attack.share * attack.noise:.2%} in noise mode" if attack.noise else ""
        return f"in every batch {attack.share:.2%} of the images are poisoned anew{target}{noise}"
    counted = count_shares(plan, poisoned)
    count, noisy = counted["images"], counted["noise_images"]
    words = f"{count} of {len(labels)} images are poisoned ({counted['share_of_data']:.2%})"
    if (of_target := counted["share_of_target_class"]) is not None:
        words += f", {of_target:.2%} of those labeled as class {attack.target}"
    return words + (f"; {noisy} more are in noise mode" if noisy else "")


def _redrawn_share_of_target(plan: Plan) -> float | None:
    attack, labels = plan.attack, plan.data.labels
    if attack is None or attack.goal == "all-to-all":
        return None
    poisoned = attack.share * len(labels)
    return poisoned / (poisoned + int((labels == attack.target).sum()))


def count_shares(plan: Plan, poisoned: PoisonedSet) -> dict[str, Any]:
    """Return which rows are poisoned, and their shares, as JSON can hold them."""
    attack, labels = plan.attack, poisoned.labels
    if attack is None:
        return {"images": 0}
    if attack.redrawn:
        return {
            "share_of_data": attack.share,
            "share_of_target_class": _redrawn_share_of_target(plan),
            "redrawn": True,
        }
    rows, noisy = (plan.rows[which].tolist() for which in (poisoned.is_poisoned, poisoned.is_noise))
    of_target = None
    if attack.goal == "all-to-one":
        of_target = len(rows) / int((labels == attack.target).sum())
    return {
        "images": len(rows),
        "share_of_data": len(rows) / len(labels),
        "share_of_target_class": of_target,
        "noise_images": len(noisy),
        "rows": " ".join(map(str, rows)),
        **({"noise_rows": " ".join(map(str, noisy))} if noisy else {}),
    }


def describe_training(plan: Plan, settings: VictimSettings) -> dict[str, Any]:
    """Return which network was trained how, as JSON can hold it."""
    return {
        "arch": public_name(plan.arch),
        **plan.pixels._asdict(),
        "training": {"kind": plan.training, **asdict(settings)},
    }


def describe_victim(
    plan: Plan, poisoned: PoisonedSet, settings: VictimSettings, *, data: str
) -> dict[str, Any]:
    """Return what was trained on what, and how it is poisoned, as a record begins."""
    attack = plan.attack
    return {
        "schema": 2,
        "name": plan.name,
        **describe_training(plan, settings),
        "attack": None if attack is None else {"name": plan.name, **attack_record(attack)},
        "poisoned": count_shares(plan, poisoned),
        "data": {
            "source": Path(data).name,
            "images": len(poisoned.labels),
            "sha256": from_tensor(plan.data.images).fingerprint,
        },
        "surrogate": None if plan.surrogate is None else plan.surrogate.checkpoint.sha256,
        "start": None if plan.start is None else plan.start.checkpoint.sha256,
    }


def measure_speed(
    backbone: Backbone,
    plan: Plan,
    poisoned: PoisonedSet,
    settings: VictimSettings,
    history: tuple[Epoch, ...],
    *,
    device: torch.device,
    precision: Precision,
) -> Speed:
    """Return how fast the median epoch was, beside what the device reaches in matrix products.

    A training step counts as three forward passes; SimCLR takes two views of an image.
    """
    images = len(poisoned.labels) // settings.batch_size * settings.batch_size
    rate = images / statistics.median(epoch.seconds for epoch in history)
    views = 2 if plan.training == "simclr" else 1
    sample = poisoned.images[:2].to(device).float() / 255
    operations = 3 * views * flops(backbone, sample)
    limit = _limit(device, precision)
    return Speed(rate, operations, limit, rate * operations / limit)


@cache
def _limit(device: torch.device, precision: Precision) -> float:
    """Measure a device once a process: its victims have it in common."""
    return matrix_limit(device, precision)


def show_attacks(
    data: str,
    out: Path,
    *,
    arch: str | None = None,
    size: int | None = None,
    name: str | None = None,
    training: Training = "supervised",
    trigger: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Draw triggers on images of ``data`` and write them to ``out``, an HTML page.

    Args:
        arch: Whose images are drawn on, where no ``size`` is given; without both, 32 pixels.
        name: Of one attack; without it every trigger is drawn, as in the paper's Figure 2.
        training: Of a victim of that attack.
        trigger: Attributes of its trigger to replace, as texts.

    Raises:
        SettingsError: If there is no such attack, or a trigger's option has no attack.
        ArchitectureError: See ``build``.
        DataError: See ``load_images``.
        OutputError: If ``out`` exists and must not be replaced, or lies in no folder.
    """
    check_output(out, overwrite=overwrite)
    if size is None and arch is not None:
        size = settle_pixels(arch, build(arch), mean=None, std=None, size=None).size
    size = 32 if size is None else size
    in_range("size", size, least=1)
    if name is not None:
        attack = named_attack(name, size=size, training=training, trigger=trigger)
        shown = {name: attack}
    elif trigger or training == "simclr":
        raise SettingsError("--simclr and a trigger's options need the name of an attack")
    else:
        shown = attacks_of_clean(size, "supervised")
        shown["badnets, SimCLR"] = named_attack("badnets", size=size, training="simclr")
    source = load_images(data, size=size, split="test")
    images = source.read(even_rows(len(source), SHOWN))
    page = render_report(
        "The attacks",
        "What a trigger does to images. CLA has that of BadNets; what it poisons is perturbed "
        "before.",
        [_picture(title, attack, images) for title, attack in sorted(shown.items())],
    )
    write_text(out, page, overwrite=overwrite)
    return out


def _picture(name: str, attack: Attack, images: RawImages) -> Picture:
    triggered = attack.trigger(images)
    return images_picture(
        name,
        {
            "clean": images,
            "triggered": triggered,
            "difference, 2 times": amplified_difference(images, triggered, gain=2),
        },
        caption=str(attack.trigger),
    )


def surrogate_augment(size: int) -> Literal["shift", "views"]:
    """Return how the clean network is augmented that CLA perturbs images of this size by."""
    return "shift" if size <= SMALL else "views"


def _make_surrogate(
    plan: Plan,
    data: str,
    out: Path,
    settings: VictimSettings,
    *,
    device: DeviceName,
    precision: PrecisionName,
    overwrite: bool,
    resume: bool,
    say: Say,
    on_step: OnStep | None,
) -> Path:
    """Return a clean network of the same kind.

    It is made as a victim of its own, with augmentation, or found in ``out`` from an earlier time.
    """
    settings = replace(settings, augment=surrogate_augment(plan.pixels.size))
    tensors, record, _ = name_files(CLEAN, out, "supervised", settings)
    if record.exists():
        made = read_victim(str(record))
        start = None if plan.start is None else plan.start.checkpoint.sha256
        own = describe_training(plan, settings) | {"attack": None, "start": start}
        wanted = json.loads(json.dumps(own))
        different = [name for name, value in wanted.items() if made.get(name) != value]
        if made.get("data", {}).get("sha256") != from_tensor(plan.data.images).fingerprint:
            different.append("data")
        if not tensors.exists() or made.get("sha256") != sha256_of(tensors):
            different.append("tensors")
        if different:
            raise OutputError(
                f"{record}: is no surrogate for this victim, for {', '.join(different)} differ; "
                "pass --surrogate, or another --out"
            )
        say(f"the surrogate is {tensors}")
        return tensors
    say("training a clean surrogate first; --surrogate FILE would spare that")
    return make_victim(
        CLEAN,
        data,
        plan.arch,
        out,
        settings,
        options={} if plan.attack is None else {"target": plan.attack.target},
        start=None if plan.start is None else plan.start.checkpoint.path,
        mean=plan.pixels.mean,
        std=plan.pixels.std,
        size=plan.pixels.size,
        device=device,
        precision=precision,
        overwrite=overwrite,
        resume=resume,
        say=say,
        on_step=on_step,
    ).tensors


def _save(path: Path, state: TrainingState, of: dict[str, str]) -> None:
    groups = {
        "network": state.network,
        "momentum": state.momentum,
        "generator": {"state": state.generator},
    }
    write_state(path, state.history, groups, of)


def _load(path: Path, of: dict[str, str]) -> TrainingState:
    named = ("network", "momentum", "generator")
    history, groups = read_state(path, of, groups=named, entry=Epoch)
    return TrainingState(
        tuple(history),
        groups["network"],
        groups["momentum"],
        groups["generator"]["state"],
    )
