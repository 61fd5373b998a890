"""The files that a job writes: which they are, what forbids them, the record and the report."""

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unbackdoor import __version__
from unbackdoor.backbones import Backbone, Loaded, Source, network_state, public_name
from unbackdoor.cbd import EpochLosses
from unbackdoor.checkpoint import (
    TORCH_SUFFIXES,
    Tree,
    check_output,
    check_tensors,
    check_unchanged,
    sha256_of,
    write_tensors,
    write_text,
)
from unbackdoor.data import ImageSource
from unbackdoor.diagnostics import Evidence
from unbackdoor.errors import OutputError, SettingsError
from unbackdoor.matching import flat_tree, matched_tensors, replace_tensors, state_dicts_apart
from unbackdoor.report import Picture, Table, bars_picture, curves_picture, render_report
from unbackdoor.types import Say
from unbackdoor.values import flatten

FLAT = (".safetensors",)
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


class Outputs(NamedTuple):
    """The files of one job; the state is deleted when the others are there."""

    tensors: Path
    record: Path
    report: Path
    state: Path


class TrainedFiles(NamedTuple):
    """The files of a victim or a detector; the state is deleted when the others are there."""

    tensors: Path
    record: Path
    state: Path


def name_outputs(out: Path) -> Outputs:
    """Return the names of all files that go with ``out``."""
    suffixes = (".json", ".html", ".state.safetensors")
    return Outputs(out, *(out.with_suffix(suffix) for suffix in suffixes))


def name_trained(tensors: Path) -> TrainedFiles:
    """Return the names of all files that go with ``tensors``, which ends in .safetensors."""
    suffixes = (".json", ".state.safetensors")
    return TrainedFiles(tensors, *(tensors.with_suffix(suffix) for suffix in suffixes))


def refuse_trained(files: TrainedFiles, *, overwrite: bool, resume: bool) -> None:
    """Refuse to replace ``files``, or to forget a state; errors are those of ``refuse_existing``.

    A run that goes on may have written its tensors; the record comes last. With a state beside it,
    a record is an older run's, which the one to go on with was told to replace.
    """
    written: tuple[Path, ...] = files[:2]
    if resume:
        written = () if files.state.exists() else files[1:2]
    refuse_existing(written, files.state, overwrite=overwrite, resume=resume)


def write_trained(
    files: TrainedFiles,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    *,
    overwrite: bool,
    say: Say,
) -> None:
    """Write tensors and, last, the record, with their hash; delete the state."""
    write_tensors(files.tensors, {**tensors}, metadata={"format": "pt"}, overwrite=overwrite)
    whole = {**record, "sha256": sha256_of(files.tensors)}
    write_text(files.record, json.dumps(whole, indent=1) + "\n", overwrite=overwrite)
    files.state.unlink(missing_ok=True)
    say(f"wrote {files.tensors} and {files.record}")


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


def check_writable(outputs: Outputs, loaded: Loaded) -> None:
    """Refuse a checkpoint whose tensors the output could not hold; errors: ``check_tensors``."""
    if outputs.tensors.suffix in FLAT:
        check_tensors(outputs.tensors, flat_tree(loaded.match, loaded.checkpoint.tree))


@torch.no_grad()
def round_as_written(loaded: Loaded, backbone: Backbone) -> None:
    """Round weights in place to the dtypes that the file has, so that these are measured.

    Raises:
        OutputError: If a value is beyond what the file's dtype can hold.
    """
    found = matched_tensors(loaded.checkpoint, loaded.match)
    for key, value in network_state(backbone).items():
        if key in found:
            rounded = value.to(found[key].dtype)
            lost = value.isfinite() & ~rounded.isfinite()
            if lost.any():
                raise OutputError(
                    f"{key} is beyond what {rounded.dtype} can hold, up to "
                    f"{value[lost].abs().max().item():.3g}; convert the input to float32 first"
                )
            value.copy_(rounded)


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
    """Write tensors, report ``page`` and, last, the record, with their hash; delete the state.

    Raises:
        CheckpointError: If the input has changed since it was read.
        OutputError: If something cannot be written.
    """
    check_unchanged(loaded.checkpoint)
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


def versions() -> dict[str, str]:
    """Return the versions of what computes, as a record holds them."""
    return {
        "unbackdoor": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scikit-learn": importlib.metadata.version("scikit-learn"),  # fits the probe
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
            "shared": [".".join((*path, name)) for path, name, _ in match.shared],
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
