"""Purify a checkpoint file: everything around the method, from the file to the report."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

from unbackdoor.backbones import (
    Backbone,
    Loaded,
    Source,
    describe_input,
    describe_network,
    open_backbone,
)
from unbackdoor.cbd import LEARNED_ON, PurifyState, network_for_search, purify, steps_per_epoch
from unbackdoor.changes import learn_changes
from unbackdoor.data import FileImages, ImageSource, even_rows, load_images
from unbackdoor.devices import (
    describe_device,
    peak_memory,
    pick_device,
    pick_precision,
    told_of_memory,
    wait_for,
)
from unbackdoor.diagnostics import MEASURED, Evidence, measure_both
from unbackdoor.errors import DivergedError
from unbackdoor.outputs import (
    Outputs,
    check_writable,
    make_record,
    plan_outputs,
    report_of,
    round_as_written,
    write_outputs,
)
from unbackdoor.ranks import ALONE, Ranks, gather_names, joined
from unbackdoor.resume import identity, load_state, save_state
from unbackdoor.settings import DeviceName, PrecisionName, PurifySettings
from unbackdoor.types import OnStep, RawImages, Say

MOST_NAMED = 10  # broken images in the account; the record has all
FEW_STEPS = 18  # of 250 images in six epochs, docs/experiments/images.md


class Estimate(NamedTuple):
    """What a job would take, measured on two real steps."""

    steps: int
    seconds_per_step: float
    seconds_to_learn: float  # the changes of one epoch
    memory: int  # peak bytes: on CUDA of the device's allocator, elsewhere of the process


def all_ranks(device: DeviceName) -> AbstractContextManager[Ranks]:
    """Join the processes that torchrun started; errors are those of ``joined``."""
    return joined(pick_device(device))


def purify_file(
    source: Source,
    images: str,
    out: Path,
    settings: PurifySettings,
    *,
    limit: int | None = None,
    max_broken: float = 0.01,
    device: DeviceName = "auto",
    precision: PrecisionName = "auto",
    compiled: bool = False,
    ranks: Ranks = ALONE,
    overwrite: bool = False,
    resume: bool = False,
    say: Say = print,
    on_step: OnStep | None = None,
) -> Outputs:
    """Purify ``source`` with ``images`` and write tensors, record and report.

    The state of every finished epoch is kept beside ``out`` until the end, so that a killed run
    can be continued by ``resume``. The input is never changed.

    Args:
        images: See ``load_images``.
        out: ``.safetensors``: the matched state dict, flat, under its own keys; one of
            ``TORCH_SUFFIXES``: all tensors of the input in its own nesting.
        limit: Take this many of the images, drawn by the seed.
        compiled: See :func:`purify`.
        ranks: Purify together with other processes, which call this with the same arguments. The
            first of them writes, and may still be at it when the others return.
        overwrite: Replace existing outputs and the state of an earlier run.
        resume: Continue from the state of an earlier run with the same input and settings.
        say: Receives what happens, line by line.
        on_step: See :func:`purify`.

    Raises:
        UnbackdoorError: See ``errors``; nothing is written then but the state of finished epochs.
    """
    outputs = plan_outputs(source.checkpoint, out, overwrite=overwrite, resume=resume)
    loaded, photos = open_both(
        source, images, settings, limit=limit, max_broken=max_broken, ranks=ranks, say=say
    )
    check_writable(outputs, loaded)
    where = pick_device(device)
    how = pick_precision(precision, where)
    say(f"on {describe_device(where)}, {how}")
    of = identity(settings, checkpoint=loaded.checkpoint.sha256, images=photos.fingerprint)
    of |= describe_network(source, loaded)
    of |= {"device": str(where), "precision": how, "compiled": str(compiled)}
    of |= {"processes": str(ranks.count)}
    state = load_state(outputs.state, of) if resume else None
    if state is not None:
        say(f"resuming after epoch {len(state.history)} of {settings.epochs}")
    elif ranks.rank == 0:
        outputs.state.unlink(missing_ok=True)  # of another run, which is being overwritten

    def on_epoch(reached: PurifyState) -> None:
        if ranks.rank == 0:
            save_state(outputs.state, reached, of)
        say(describe_epoch(reached, settings))

    try:
        with told_of_memory(where):
            backbone, history = purify(
                loaded.backbone,
                photos,
                settings,
                device=where,
                precision=how,
                compiled=compiled,
                ranks=ranks,
                state=state,
                on_step=on_step,
                on_epoch=on_epoch,
            )
    except DivergedError as error:
        kept = f"; the last good epoch is kept in {outputs.state}" if outputs.state.exists() else ""
        raise DivergedError(f"{error}{kept}") from error

    sample = photos.read(even_rows(len(photos), MEASURED))
    broken = gather_names(photos.broken, ranks)  # each rank has read images of its own
    if ranks.rank > 0:
        return outputs
    say("measuring what changed")
    round_as_written(loaded, cast("Backbone", backbone))
    evidence = measure_both(backbone, loaded.backbone, sample, settings)
    say(describe_evidence(evidence))
    if broken:
        named = ", ".join(broken[:MOST_NAMED])
        say(f"{len(broken)} broken images were replaced by the next good one: {named}")
    record = make_record(source, loaded, images, photos, settings, history, evidence, broken=broken)
    record |= {"device": describe_device(where), "precision": how, "processes": ranks.count}
    record |= {"compiled": compiled, "output": outputs.tensors.name}
    write_outputs(
        outputs,
        loaded,
        cast("Backbone", backbone),
        record,
        page=report_of(record),
        overwrite=overwrite or resume,
        say=say,
    )
    return outputs


def dry_run(
    source: Source,
    images: str,
    out: Path,
    settings: PurifySettings,
    *,
    limit: int | None = None,
    max_broken: float = 0.01,
    device: DeviceName = "auto",
    precision: PrecisionName = "auto",
    compiled: bool = False,
    ranks: Ranks = ALONE,
    overwrite: bool = False,
    resume: bool = False,
    say: Say = print,
) -> Estimate:
    """Say what would be matched and written, run two real steps, and write nothing.

    Arguments and errors are those of :func:`purify_file`.
    """
    outputs = plan_outputs(source.checkpoint, out, overwrite=overwrite, resume=resume)
    loaded, photos = open_both(
        source, images, settings, limit=limit, max_broken=max_broken, ranks=ranks, say=say
    )
    check_writable(outputs, loaded)
    steps = settings.epochs * steps_per_epoch(len(photos), settings, ranks)
    where = pick_device(device)
    times: list[float] = []

    def on_step(step: int, steps: int) -> None:
        wait_for(where)
        times.append(time.monotonic())

    size = settings.batch_size
    few = replace(settings.changes, steps=2)
    with told_of_memory(where):
        purify(
            loaded.backbone,
            photos.read([row % len(photos) for row in range(2 * size)]),  # two batches, one epoch
            replace(settings, epochs=1, changes=few),
            device=where,
            precision=pick_precision(precision, where),
            compiled=compiled,
            ranks=ranks,
            on_step=on_step,
        )
        learning = 0.0
        if settings.learns_changes:
            raw = photos.read(range(min(LEARNED_ON, len(photos))))
            network = network_for_search(
                loaded.backbone.to(where),
                nn.Identity(),
                raw[:size].to(where).float() / 255,
                settings,
                precision=pick_precision(precision, where),
                compiled=compiled,
            )
            learning = seconds_to_learn(network, raw, settings, device=where, ranks=ranks)
    estimate = Estimate(steps, times[-1] - times[-2], learning, peak_memory(where))
    seconds = round(steps * estimate.seconds_per_step + settings.epochs * learning)
    say(
        f"would take about {seconds // 3600} h {seconds // 60 % 60} min {seconds % 60} s "
        f"on {where}: {steps} steps of {estimate.seconds_per_step:.2f} s, {settings.epochs} times "
        f"{learning:.1f} s to learn changes, "
        f"{estimate.memory / 2**20:.0f} MiB at the peak"
    )
    say(f"would write {outputs.tensors}, {outputs.record} and {outputs.report}; wrote nothing")
    return estimate


def seconds_to_learn(
    network: nn.Module,
    raw: RawImages,
    settings: PurifySettings,
    *,
    device: torch.device,
    ranks: Ranks,
) -> float:
    """Return how long the changes of one epoch take, from no step and from two."""
    generator = torch.Generator(device).manual_seed(settings.seed)
    moments = []
    for steps in (0, 2):
        started, some = time.monotonic(), replace(settings.changes, steps=steps)
        learn_changes(
            network,
            raw,
            some,
            batch_size=settings.batch_size,
            generator=generator,
            ranks=ranks,
        )
        wait_for(device)
        moments.append(time.monotonic() - started)
    before, both = moments
    return before + max(0.0, both - before) / 2 * settings.changes.steps


def open_both(
    source: Source,
    images: str,
    settings: PurifySettings,
    *,
    limit: int | None,
    max_broken: float,
    ranks: Ranks,
    say: Say,
) -> tuple[Loaded, ImageSource]:
    """Open checkpoint and images, and say what they are."""
    loaded = open_backbone(source)
    describe_input(source, loaded, say=say)
    photos = load_images(
        images, size=loaded.size, limit=limit, seed=settings.seed, max_broken=max_broken
    )
    part = f" of its part {photos.part!r}" if isinstance(photos, FileImages) and photos.part else ""
    say(f"{images}: {len(photos)} unlabeled images{part}, brought to {loaded.size} × {loaded.size}")
    steps = settings.epochs * steps_per_epoch(len(photos), settings, ranks)
    if steps < FEW_STEPS:
        say(
            f"warning: {len(photos)} images make {steps} steps in all, where {FEW_STEPS} are the "
            "least that was ever tried; pass more images, or more --epochs"
        )
    return loaded, photos


def describe_evidence(evidence: Mapping[str, Evidence]) -> str:
    """Return one line about what was changed."""
    before, after = evidence["before"], evidence["after"]
    return (
        f"clean features keep a cosine of {after.cosine:.3f} to the original and "
        f"{after.neighbours:.0%} of their neighbours; searched images move by "
        f"{after.adversarial:.3f}, before by {before.adversarial:.3f}"
    )


def describe_epoch(state: PurifyState, settings: PurifySettings) -> str:
    """Return one line about the epoch that ended last."""
    last = state.history[-1]
    return (
        f"epoch {len(state.history)}/{settings.epochs}  loss {last.total:.3f}  "
        f"pull {last.pull:.3f}  distill {last.distill:.3f}  align {last.align:.3f}  "
        f"{last.seconds:.0f} s"
    )
