"""Purify a checkpoint file: everything around the method, from the file to the report."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn

from unbackdoor import __version__
from unbackdoor.backbones import Backbone, Loaded, network_state, open_backbone, public_name
from unbackdoor.cbd import (
    LEARNED_ON,
    EpochLosses,
    PurifyState,
    network_for_search,
    purify,
    steps_per_epoch,
)
from unbackdoor.changes import learn_changes
from unbackdoor.checkpoint import (
    TORCH_SUFFIXES,
    Tree,
    check_output,
    check_tensors,
    sha256_of,
    write_tensors,
    write_text,
)
from unbackdoor.data import ImageSource, even_rows, load_images
from unbackdoor.devices import peak_memory, pick_device, pick_precision, wait_for
from unbackdoor.diagnostics import Evidence, measure
from unbackdoor.errors import DeviceError, DivergedError, OutputError, SettingsError
from unbackdoor.matching import (
    describe_match,
    flat_tree,
    matched_tensors,
    replace_tensors,
    state_dicts_apart,
)
from unbackdoor.ranks import ALONE, Ranks, gather_names, joined
from unbackdoor.report import Picture, Table, bars_picture, curves_picture, render_report
from unbackdoor.resume import identity, load_state, save_state
from unbackdoor.settings import PurifySettings, flatten
from unbackdoor.types import RawImages

MEASURED = 256  # images that the evidence before and after is measured on
MOST_NAMED = 10  # broken images in the account; the record has all
FLAT = (".safetensors",)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Which checkpoint to read, and how.

    Attributes:
        checkpoint: A file, or a Hugging Face folder.
        arch: A timm name, ``torchvision/NAME``, ``cifar/NAME`` or ``path/to/file.py:function``.
        mean: Per channel, on the [0, 1] scale; the architecture's by default.
        std: Per channel, on the [0, 1] scale; the architecture's by default.
        size: Side of the images in pixels; the architecture's by default.
        head: Name of the module that turns features into logits, or ``none``; found by itself.
        nesting: Dotted place of the state dict in the file; found by itself.
        prefix: Of its keys; found by itself.
    """

    checkpoint: Path
    arch: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    head: str | None = None
    nesting: str | None = None
    prefix: str | None = None


class Outputs(NamedTuple):
    """The files of one job; the state is deleted when the others are there."""

    tensors: Path
    record: Path
    report: Path
    state: Path


class Estimate(NamedTuple):
    """What a job would take, measured on two real steps."""

    steps: int
    seconds_per_step: float
    seconds_to_learn: float  # the changes of one epoch
    memory: int  # peak bytes: on CUDA of the device's allocator, elsewhere of the process


def open_source(source: Source) -> Loaded:
    """Open the backbone that ``source`` describes; errors are those of ``open_backbone``."""
    return open_backbone(
        source.checkpoint,
        source.arch,
        mean=source.mean,
        std=source.std,
        size=source.size,
        head=source.head,
        nesting=source.nesting,
        prefix=source.prefix,
    )


def all_ranks(device: Literal["auto", "cpu", "cuda", "mps"]) -> AbstractContextManager[Ranks]:
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
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    compiled: bool = False,
    ranks: Ranks = ALONE,
    overwrite: bool = False,
    resume: bool = False,
    say: Say = print,
    on_step: Callable[[int, int], None] | None = None,
) -> Outputs:
    """Purify ``source`` with ``images`` and write tensors, record and report.

    The state of every finished epoch is kept beside ``out`` until the end, so that a killed run
    can be continued by ``resume``. The input is never changed.

    Args:
        images: See ``load_images``.
        out: ``.safetensors``: the matched state dict, flat, under its own keys; ``.pt``, ``.pth``
            or ``.bin``: all tensors of the input in its own nesting.
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
    evidence = measure_both(loaded, backbone, sample, settings, device=where)
    if broken:
        named = ", ".join(broken[:MOST_NAMED])
        say(f"{len(broken)} broken images were replaced by the next good one: {named}")
    record = make_record(source, loaded, images, photos, settings, history, evidence, broken=broken)
    record |= {"device": str(where), "precision": how, "processes": ranks.count}
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
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    compiled: bool = False,
    ranks: Ranks = ALONE,
    say: Say = print,
) -> Estimate:
    """Say what would be matched and written, run two real steps, and write nothing.

    Arguments and errors are those of :func:`purify_file`.
    """
    outputs = plan_outputs(source.checkpoint, out, overwrite=True, resume=False)
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
            generator = torch.Generator(where).manual_seed(settings.seed)
            raw = photos.read(range(min(LEARNED_ON, len(photos))))
            network = network_for_search(
                loaded.backbone.to(where),
                nn.Identity(),
                raw[:size].to(where).float() / 255,
                settings,
                precision=pick_precision(precision, where),
                compiled=compiled,
            )
            moments = []
            for done in (0, few.steps):
                started, some = time.monotonic(), replace(few, steps=done)
                learn_changes(network, raw, some, batch_size=size, generator=generator, ranks=ranks)
                wait_for(where)
                moments.append(time.monotonic() - started)
            before, both = moments
            learning = before + max(0.0, both - before) / few.steps * settings.changes.steps
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


@contextmanager
def told_of_memory(device: torch.device) -> Iterator[None]:
    """Turn what PyTorch raises when ``device`` has no memory left into a DeviceError."""
    try:
        yield
    except RuntimeError as error:
        on_cpu = "DefaultCPUAllocator" in str(error)  # has no class of its own
        if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        raise DeviceError(
            f"{device} is out of memory; pass a smaller --batch-size (to purify by default, also a "
            "smaller --changes.group; to defend, --set tuning.batch_size or batch_size)"
        ) from error


def plan_outputs(checkpoint: Path, out: Path, *, overwrite: bool, resume: bool) -> Outputs:
    """Return the files to write, after all that could forbid writing them has been checked.

    Raises:
        OutputError: If ``out`` has another suffix, is the input, or exists; as ``check_output``;
            or if an interrupted run left its state and it is neither resumed nor overwritten.
    """
    if out.suffix not in FLAT + TORCH_SUFFIXES:
        raise OutputError(f"{out}: end it in {', '.join(FLAT + TORCH_SUFFIXES)}")
    outputs = name_outputs(out)
    for path in outputs:
        check_output(path, overwrite=True, inputs=[checkpoint])
    written = () if resume else outputs[:3]
    refuse_existing(written, outputs.state, overwrite=overwrite, resume=resume)
    return outputs


def versions() -> dict[str, str]:
    """Return the versions of what computes, as a record holds them."""
    return {
        "unbackdoor": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scikit-learn": importlib.metadata.version("scikit-learn"),  # fits the probe
    }


def refuse_existing(written: Iterable[Path], state: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse to replace what a run would write, and to forget what an interrupted one has kept.

    Raises:
        OutputError: If one of ``written`` exists and must not be replaced, or if ``state`` does and
            is neither resumed nor overwritten.
        SettingsError: If it shall both start again and go on.
    """
    if overwrite and resume:
        raise SettingsError("--force starts again and --resume goes on; pass one of them")
    if overwrite:
        return
    for path in written:
        if path.exists():
            raise OutputError(f"{path}: exists already; pass --force to replace it")
    if state.exists() and not resume:
        raise OutputError(
            f"{state}: an interrupted run can go on from here; pass --resume to its "
            "command, or --force to drop it"
        )


def name_outputs(out: Path) -> Outputs:
    """Return the names of all files that go with ``out``."""
    suffixes = (".json", ".html", ".state.safetensors")
    return Outputs(out, *(out.with_suffix(suffix) for suffix in suffixes))


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
    loaded = open_source(source)
    describe_input(source, loaded, say=say)
    photos = load_images(
        images, size=loaded.size, limit=limit, seed=settings.seed, max_broken=max_broken
    )
    say(f"{images}: {len(photos)} unlabeled images, brought to {loaded.size} × {loaded.size}")
    steps_per_epoch(len(photos), settings, ranks)
    return loaded, photos


def describe_input(source: Source, loaded: Loaded, *, say: Say) -> None:
    """Say what the checkpoint is and which of its tensors are used."""
    say(f"{source.checkpoint}: {loaded.checkpoint.kind}, sha256 {loaded.checkpoint.sha256[:16]}")
    say(describe_match(loaded.match, loaded.checkpoint))
    pixels = (loaded.backbone.mean, loaded.backbone.std)
    mean, std = (", ".join(f"{value:.4g}" for value in each.flatten().tolist()) for each in pixels)
    say(f"{source.arch}: {loaded.dimension} features; pixels less mean {mean}, over std {std}")


def describe_network(source: Source, loaded: Loaded) -> dict[str, str]:
    """Return what makes a checkpoint's tensors this network, for the state of a run."""
    match, backbone = loaded.match, loaded.backbone
    return {
        "arch": source.arch,
        "place": ".".join((*match.nesting, match.prefix)),
        "head": ", ".join(backbone.head_names),
        "mean": str(backbone.mean.flatten().tolist()),
        "std": str(backbone.std.flatten().tolist()),
        "size": str(loaded.size),
    }


def describe_epoch(state: PurifyState, settings: PurifySettings) -> str:
    """Return one line about the epoch that ended last."""
    last = state.history[-1]
    return (
        f"epoch {len(state.history)}/{settings.epochs}  loss {last.total:.3f}  "
        f"pull {last.pull:.3f}  distill {last.distill:.3f}  align {last.align:.3f}  "
        f"{last.seconds:.0f} s"
    )


def measure_both(
    loaded: Loaded,
    backbone: nn.Module,
    images: RawImages,
    settings: PurifySettings,
    *,
    device: torch.device,
) -> dict[str, Evidence]:
    """Return the evidence on ``images`` before and after; the original goes to ``device``."""
    original = loaded.backbone.to(device)
    with told_of_memory(device):
        return {
            "before": measure(original, original, images, settings),
            "after": measure(backbone, original, images, settings),
        }


def make_record(
    source: Source,
    loaded: Loaded,
    images: str,
    photos: ImageSource,
    settings: Any,
    history: tuple[EpochLosses, ...],
    evidence: Mapping[str, Evidence],
    *,
    broken: Sequence[str],
) -> dict[str, Any]:
    """Return everything about a finished job that JSON can hold; file names without folders.

    Args:
        settings: A dataclass.
        broken: Images that could not be decoded.
    """
    match, checkpoint = loaded.match, loaded.checkpoint
    return {
        "schema": 1,
        "unbackdoor": __version__,
        "input": {
            "name": checkpoint.path.name,
            "kind": checkpoint.kind,
            "sha256": checkpoint.sha256,
        },
        "arch": public_name(source.arch),
        "mean": loaded.backbone.mean.flatten().tolist(),
        "std": loaded.backbone.std.flatten().tolist(),
        "matched": {
            "nesting": list(match.nesting),
            "prefix": match.prefix,
            "tensors": len(match.keys),
            "head": list(match.head),
            "left_over": list(match.left_over),
            "other": list(match.other),
        },
        "dropped": list(checkpoint.dropped),
        "images": {
            "source": Path(images).name,
            "count": len(photos),
            "size": list(photos.size),
            "fingerprint": photos.fingerprint,
            "broken": list(broken),
        },
        "settings": asdict(settings),
        "history": [epoch._asdict() for epoch in history],
        "evidence": {when: asdict(values) for when, values in evidence.items()},
        "versions": versions(),
    }


def check_writable(outputs: Outputs, loaded: Loaded) -> None:
    """Refuse a checkpoint whose tensors the output could not hold; errors: ``check_tensors``."""
    if outputs.tensors.suffix in FLAT:
        check_tensors(outputs.tensors, flat_tree(loaded.match, loaded.checkpoint.tree))


@torch.no_grad()
def round_as_written(loaded: Loaded, backbone: Backbone) -> None:
    """Round weights in place to the dtypes that the file has, so that these are measured."""
    found = matched_tensors(loaded.checkpoint, loaded.match)
    for key, value in network_state(backbone).items():
        if key in found:
            value.copy_(value.to(found[key].dtype))


def write_outputs(
    outputs: Outputs,
    loaded: Loaded,
    backbone: Backbone,
    record: dict[str, Any],
    *,
    page: str,
    overwrite: bool,
    say: Say,
) -> None:
    """Write tensors, report ``page`` and, last, the record, with their hash; delete the state."""
    tree: Tree = replace_tensors(loaded.checkpoint, loaded.match, network_state(backbone))
    if outputs.tensors.suffix in FLAT:
        for apart in state_dicts_apart(loaded.match, tree):
            say(f"not in {outputs.tensors.name}, which is flat: {apart}")
        tree = {**flat_tree(loaded.match, tree)}
    kept = ("unbackdoor", "input", "arch", "images", "settings", "versions", "device", "precision")
    more = ("compiled", "processes", "defense", "labels")
    provenance = {name: record[name] for name in (*kept, *more) if name in record}
    metadata = {"format": "pt", "unbackdoor": json.dumps(provenance)}  # others ask for a format
    write_tensors(outputs.tensors, tree, metadata=metadata, overwrite=overwrite)
    record = {**record, "output_sha256": sha256_of(outputs.tensors)}
    write_text(outputs.report, page, overwrite=overwrite)
    write_text(outputs.record, json.dumps(record, indent=1) + "\n", overwrite=overwrite)
    outputs.state.unlink(missing_ok=True)
    for path in outputs[:3]:
        say(f"wrote {path} (sha256 {sha256_of(path)[:16]})")


def report_of(record: Mapping[str, Any]) -> str:
    """Return the report of one finished job as an HTML page."""
    before, after = record["evidence"]["before"], record["evidence"]["after"]
    source = record["input"]
    searched, control = (
        (
            "Changes of all images, learned so that they gather features at one place,",
            "the same changes before they were learned",
        )
        if record["settings"]["search"]["kind"] == "changes"
        else ("Images searched for by the contrastive loss", "random noise of the same radius")
    )
    summary = (
        f"{source['name']} was tuned on {record['images']['count']} unlabeled images. Its features "
        f"of clean images keep a cosine of {after['cosine']:.3f} to the original and "
        f"{after['neighbours']:.0%} of their nearest neighbours. {searched} moved them by "
        f"{before['adversarial']:.3f} before and {after['adversarial']:.3f} after; {control} by "
        f"{before['noise']:.3f} and {after['noise']:.3f}. None of this says that the file was, or "
        "is no longer, backdoored."
    )
    return render_report(
        f"Purified: {source['name']}",
        summary,
        (
            evidence_table(record["evidence"]),
            movement_picture(record["evidence"]),
            losses_picture(record["history"]),
            *account_tables(record),
        ),
    )


def movement_picture(evidence: Mapping[str, Mapping[str, float]]) -> Picture:
    """Return how far the search and noise move features, before and after."""
    before, after = evidence["before"], evidence["after"]
    return bars_picture(
        "How far features move",
        {
            "searched images": {"before": before["adversarial"], "after": after["adversarial"]},
            "the control": {"before": before["noise"], "after": after["noise"]},
        },
        x_label="mean cosine distance to the clean image's features",
        decimals=3,
        caption="Where searched images move no further than the control, this search found no "
        "shortcut; another might. The control is random noise of the search's radius, or the same "
        "changes of all images before they were learned.",
    )


def account_tables(record: Mapping[str, Any]) -> tuple[Table, Table]:
    """Return the settings and the provenance of a job, folded."""
    return (
        Table(
            "Settings",
            ("setting", "value"),
            tuple((name, str(value)) for name, value in flatten(record["settings"])),
            folded=True,
        ),
        Table(
            "Provenance",
            ("what", "value"),
            tuple(
                (name, str(value))
                for part in ("input", "arch", "matched", "dropped", "images", "versions")
                for name, value in flatten({part: record[part]})
            ),
            folded=True,
        ),
    )


EVIDENCE_ROWS = (
    ("cosine", "cosine of clean features to the original", "1 is unchanged"),
    ("neighbours", "nearest neighbours shared with the original", "share of 10; 1 is unchanged"),
    ("alignment", "alignment of two views", "mean squared distance; lower is more invariant"),
    ("uniformity", "uniformity", "log mean Gaussian potential; lower is more spread out"),
    ("adversarial", "movement by searched images", "mean cosine distance"),
    ("noise", "movement by the control", "random noise, or changes before they were learned"),
    ("concentration", "concentration of searched images", "0 scattered, 1 all at one place"),
    ("noise_concentration", "concentration of the control", "likewise"),
)


def evidence_table(evidence: Mapping[str, Mapping[str, float]]) -> Table:
    """Return the evidence before and after as a table."""
    return Table(
        "Label-free evidence",
        ("measure", *evidence, "reading"),
        tuple(
            (words, *(values[name] for values in evidence.values()), reading)
            for name, words, reading in EVIDENCE_ROWS
        ),
        decimals=3,
        note=f"On {evidence['after']['images']} of the unlabeled images.",
    )


def losses_picture(history: list[dict[str, float]]) -> Picture:
    """Return the loss curves of a run."""
    names = ("total", "pull", "distill", "align")
    used = {name: [epoch[name] for epoch in history] for name in names}
    return curves_picture(
        "Losses",
        {name: values for name, values in used.items() if name == "total" or any(values)},
        x_label="epoch",
        y_label="mean loss",
    )
