"""Run a defense on a checkpoint file: everything around it, from the file to the report."""

import copy
import hashlib
import importlib
import inspect
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch

from unbackdoor.backbones import (
    Backbone,
    Source,
    describe_input,
    describe_network,
    import_function,
    is_own,
    network_state,
    open_backbone,
    own_hash,
)
from unbackdoor.data import even_rows, from_tensor, load_images, load_labeled
from unbackdoor.defenses import DEFENSES
from unbackdoor.defenses.common import Defended, DefenseData, predict
from unbackdoor.defenses.keeping import Keeper
from unbackdoor.devices import describe_device, pick_device, seeded, told_of_memory
from unbackdoor.diagnostics import MEASURED, measure_both
from unbackdoor.errors import DataError, DivergedError, SettingsError, UnlabeledError, unknown
from unbackdoor.outputs import (
    Outputs,
    account_tables,
    check_writable,
    evidence_table,
    make_record,
    movement_picture,
    plan_outputs,
    round_as_written,
    write_outputs,
)
from unbackdoor.report import Table, render_report
from unbackdoor.resume import check_identity
from unbackdoor.roles import defender_rows
from unbackdoor.settings import SHARES, DeviceName, LabelKind, PurifySettings, check_seed
from unbackdoor.types import Labels, OnStep, RawImages, Say
from unbackdoor.values import flatten, settings_from

SHOWN = 300  # characters of a value in the report


@dataclass(frozen=True)
class NoSettings:
    """Settings of a defense of one's own that says nothing of settings."""


class Chosen(NamedTuple):
    """A defense that can be run."""

    name: str
    function: Callable[..., Any]
    settings: Any  # a dataclass
    labels: bool  # whether it needs any
    seed: int = 0


class Owned(NamedTuple):
    """The defender's images, and their true classes where the source tells them."""

    images: RawImages
    truth: Labels | None
    broken: tuple[str, ...] = ()  # images that could not be decoded, replaced by others


def defend_file(
    name: str,
    source: Source,
    data: str,
    out: Path,
    *,
    values: Sequence[str] = (),
    labels: LabelKind | None = None,
    share: float | None = None,
    seed: int = 0,
    device: DeviceName = "auto",
    overwrite: bool = False,
    resume: bool = False,
    say: Say = print,
    on_step: OnStep | None = None,
) -> Outputs:
    """Run the defense ``name`` on ``source`` and write tensors, record and report.

    The files and the promises about them are those of ``purify_file``.

    Args:
        name: One of ``DEFENSES``, or ``path/to/file.py:function`` of the same signature.
        data: The defender's images, see ``load_labeled``; without labels in it, any source of
            ``load_images`` does.
        values: Settings as ``name=value``.
        labels: ``given``: the source's own; ``pseudo``: what the checkpoint predicts; ``none``.
            By default, given for a defense that needs labels.
        share: Of the training images; .01 with given labels, .05 otherwise.
        seed: Of the split, which is that of ``evaluate``, and of the defense.
        resume: Go on where an interrupted run of the same arguments was, if its defense keeps that.

    Raises:
        UnbackdoorError: See ``errors``; nothing is written then but the state to resume from.
    """
    outputs = plan_outputs(source.checkpoint, out, overwrite=overwrite, resume=resume)
    chosen = find_defense(name, values, seed=seed)
    kind: LabelKind = labels or ("given" if chosen.labels else "none")
    if chosen.labels and kind == "none":
        raise SettingsError(f"{name} needs labels; pass --labels given or --labels pseudo")
    loaded = open_backbone(source)
    describe_input(source, loaded, say=say)
    check_writable(outputs, loaded)
    where = pick_device(device)
    pool = load_pool(data, size=loaded.size, labels=kind, share=share, seed=seed)
    with told_of_memory(where):
        given = label(loaded.backbone.to(where), pool.images, pool.truth, kind)
    agreement = pseudo_label_accuracy(given, pool.truth, kind)
    say(f"{data}: {len(pool.images)} images, labels: {kind}; on {describe_device(where)}")
    if pool.broken:
        say(f"{len(pool.broken)} broken images were replaced: {', '.join(pool.broken[:5])}")
    if agreement is not None:
        say(f"pseudo-labels are right for {agreement:.1%} of them")

    photos = from_tensor(pool.images)
    of = {
        "defense": json.dumps([Path(chosen.name).name, asdict(chosen.settings), kind, chosen.seed]),
        "defense_code": own_hash(chosen.name),
        "checkpoint": loaded.checkpoint.sha256,
        "images": photos.fingerprint,
        "labels": _hash(given.labels),
        "device": str(where),
        **describe_network(source, loaded),
    }
    if resume:
        check_identity(outputs.state, of)
    else:
        outputs.state.unlink(missing_ok=True)  # of another run, which is being overwritten
    keep = Keeper(outputs.state, of)
    with told_of_memory(where):
        result = run_defense(
            chosen, loaded.backbone, given, device=where, on_step=on_step, keep=keep
        )
    round_as_written(loaded, result.backbone)
    tuned = [] if heads_equal(result.backbone, loaded.backbone) else loaded.backbone.head_names
    say(f"the head {', '.join(tuned)} was tuned too" if tuned else "the head is as it was")

    say("measuring what changed")
    sample = pool.images[even_rows(len(pool.images), MEASURED)]
    options = PurifySettings(seed=seed)
    evidence = measure_both(result.backbone, loaded.backbone, sample, options)
    record = make_record(
        source, loaded, data, photos, chosen.settings, (), evidence, broken=pool.broken
    )
    record |= {
        "defense": Path(chosen.name).name,
        "head_tuned": bool(tuned),
        "labels": {"kind": kind, "pseudo_label_accuracy": agreement},
        "seed": seed,
        "log": result.log,
        "device": describe_device(where),
        "precision": "fp32",
        "output": outputs.tensors.name,
    }
    page = report_of(record)
    write_outputs(
        outputs, loaded, result.backbone, record, page=page, overwrite=overwrite or resume, say=say
    )
    return outputs


def _hash(labels: Labels | None) -> str:
    return "" if labels is None else hashlib.sha256(labels.cpu().numpy().data).hexdigest()


def find_defense(name: str, values: Sequence[str] = (), *, seed: int = 0) -> Chosen:
    """Return the defense ``name`` with its settings.

    Args:
        values: See :func:`settings_from`.
        seed: What a setting of that name becomes, unless ``values`` say otherwise.

    Raises:
        SettingsError: If there is no such defense or setting, or a seed that cannot be.
        ArchitectureError: If the file of a defense of one's own fails.
    """
    file, _, function_name = name.rpartition(":")
    if is_own(name):
        function = import_function(Path(file), function_name, flag="NAME")
        kind = _own_settings(function, name)
        needs_labels = False  # it says itself what it lacks
    elif name in DEFENSES:
        entry = DEFENSES[name]
        module, _, function_name = entry.place.partition(":")
        function = getattr(importlib.import_module(f"unbackdoor.defenses.{module}"), function_name)
        kind, needs_labels = entry.settings, entry.labels
    else:
        own = ", and path/to/file.py:function"
        raise SettingsError(unknown("defense", name, DEFENSES, others=own))
    defaults = kind()
    check_seed(seed)
    if any(item.name == "seed" for item in fields(defaults)):
        defaults = replace(defaults, seed=seed)
    settings = settings_from(defaults, values)
    check_seed(getattr(settings, "seed", 0))
    try:
        json.dumps(asdict(settings))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{name}: its settings must be what JSON can hold: {error}") from error
    return Chosen(name, function, settings, needs_labels, seed)


def load_pool(data: str, *, size: int, labels: LabelKind, share: float | None, seed: int) -> Owned:
    """Return the images that the defender has, see ``defender_rows``; never test images.

    Raises:
        DataError: If the source cannot be read or is too small, or if ``share`` is out of range.
        UnlabeledError: If the source lacks labels that are asked for.
    """
    share = SHARES[labels] if share is None else share
    if not 0 < share <= 1:
        raise DataError(f"--share is above 0 and at most 1, got {share}")
    draw = partial(defender_rows, labeled=labels == "given", share=share, seed=seed)
    if labels != "none":  # with the truth, where there is one, pseudo-labels can be compared
        try:
            images, truth, _ = load_labeled(data, split="train", size=size)
        except UnlabeledError:
            if labels == "given":
                raise
        else:
            taken = draw(len(images))
            return Owned(images[taken], truth[taken])
    photos = load_images(data, size=size, split="train")
    return Owned(photos.read(draw(len(photos)).tolist()), None, tuple(photos.broken))


def label(
    backbone: Backbone, images: RawImages, truth: Labels | None, kind: LabelKind
) -> DefenseData:
    """Return what a defense is given: the images, with labels of the kind asked for."""
    if kind == "none":
        return DefenseData(images)
    return DefenseData(images, truth if kind == "given" else predict(backbone, images))


def pseudo_label_accuracy(data: DefenseData, truth: Labels | None, kind: LabelKind) -> float | None:
    """Return the share of pseudo-labels that are right; None if there are none, or no truth."""
    if kind != "pseudo" or truth is None or data.labels is None:
        return None
    return (data.labels == truth).float().mean().item()


def run_defense(
    chosen: Chosen,
    backbone: Backbone,
    data: DefenseData,
    *,
    device: torch.device,
    on_step: OnStep | None = None,
    keep: Keeper | None = None,
) -> Defended:
    """Run a defense on copies of what it is given; return the backbone with the tensors it made.

    Tensors are all that a file holds. Whatever else the defense did to its copy, a hook or a mode,
    is gone, so that what is measured and scored is what is written. See :func:`contained`, too.

    Args:
        keep: Handed to a defense that takes it, which then goes on where a killed one was.

    Raises:
        UnbackdoorError: See :func:`check_result`, and what the defense itself raises.
    """
    labels = None if data.labels is None else data.labels.clone()
    copied = DefenseData(data.images.clone(), labels)
    options: dict[str, Any] = {"device": device, "on_step": on_step}
    if "keep" in inspect.signature(chosen.function).parameters:
        options["keep"] = keep
    with contained(chosen.seed, device):
        result = chosen.function(copy.deepcopy(backbone), copied, chosen.settings, **options)
    check_result(result, backbone, chosen.name)
    repaired, made = copy.deepcopy(backbone).to(device).eval(), network_state(result.backbone)
    with torch.no_grad():
        for key, value in network_state(repaired).items():
            value.copy_(made[key])
    return Defended(repaired, result.log)


@contextmanager
def contained(seed: int, device: torch.device) -> Iterator[None]:
    """Seed all global generators while inside, with gradients on.

    What is done to these, to whether there are gradients, and to the default dtype, is undone.
    """
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    dtype = torch.get_default_dtype()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        with seeded(seed, device), torch.enable_grad():
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)  # noqa: NPY002
        torch.set_default_dtype(dtype)


def check_result(result: Any, original: Backbone, name: str) -> None:
    """Raise unless ``result`` has tensors that can be written in place of those of ``original``.

    Raises:
        SettingsError: If it is something else, as a defense of one's own may return.
        DivergedError: If it holds NaN or infinite weights.
    """
    if not isinstance(result, Defended) or not isinstance(result.backbone, Backbone):
        raise SettingsError(
            f"{name} returned a {type(result).__name__}; a defense returns Defended(backbone, log)"
        )
    if not isinstance(result.log, dict):
        raise SettingsError(f"{name}: its log must be a dict, got a {type(result.log).__name__}")
    try:
        json.dumps(result.log, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{name}: its log must be what JSON can hold: {error}") from error
    before, after = network_state(original), network_state(result.backbone)
    if {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in after.items()}:
        raise SettingsError(f"{name} must return the backbone with tensors of the same shapes")
    broken = [key for key, value in after.items() if not value.isfinite().all()]
    if broken:
        raise DivergedError(f"{name} ended with NaN or infinite values in {', '.join(broken[:3])}")


def heads_equal(one: Backbone, other: Backbone) -> bool:
    """Return whether the heads of two copies of a backbone have the same weights."""
    first, second = one.heads.state_dict(), other.heads.state_dict()
    return all(value.cpu().equal(second[key].cpu()) for key, value in first.items())


def in_short(value: object) -> str:
    """Return a value as the page shows it; a long list is whole in the record only."""
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} … (the JSON has all of it)"


def report_of(record: Mapping[str, Any]) -> str:
    """Return the report of one finished defense as an HTML page."""
    after, source, kind = record["evidence"]["after"], record["input"], record["labels"]["kind"]
    words = {
        "given": "given labels",
        "pseudo": "labels that it predicts itself",
        "none": "no labels",
    }
    summary = (
        f"{source['name']} was repaired by {record['defense']} with {record['images']['count']} "
        f"images and {words[kind]}. Its features of clean images keep a cosine of "
        f"{after['cosine']:.3f} to the original and {after['neighbours']:.0%} of their nearest "
        "neighbours. None of this says that the file was, or is no longer, backdoored."
    )
    log = [(name, in_short(value)) for name, value in flatten(record["log"])]
    agreement = record["labels"]["pseudo_label_accuracy"]
    if agreement is not None:
        log.insert(0, ("pseudo-labels that are right", f"{agreement:.1%}"))
    return render_report(
        f"Defended by {record['defense']}: {source['name']}",
        summary,
        (
            evidence_table(record["evidence"]),
            movement_picture(record["evidence"]),
            Table("What was chosen", ("what", "value"), log, folded=True),
            *account_tables(record),
        ),
    )


def _own_settings(function: Callable[..., Any], name: str) -> Callable[[], Any]:
    """Return the dataclass that the signature of a defense of one's own names for its settings."""
    try:
        kind = get_type_hints(function).get("settings", NoSettings)
        get_type_hints(kind)
    except (NameError, TypeError) as error:
        raise SettingsError(f"{name}: its annotations cannot be read: {error}") from error
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return NoSettings
    for item in fields(kind):
        if item.default is MISSING and item.default_factory is MISSING:
            raise SettingsError(f"{name}: the setting {item.name!r} has no default; give it one")
    return kind
