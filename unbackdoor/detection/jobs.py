"""Train a detector on a backbone's file: everything around it, and open what it wrote."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor.backbones import (
    Backbone,
    Source,
    build,
    describe_network,
    open_backbone,
    public_name,
)
from unbackdoor.checkpoint import (
    Tree,
    check_output,
    read_checkpoint,
)
from unbackdoor.detection.network import Level, find_levels, make_detector
from unbackdoor.detection.training import (
    Epoch,
    TrainingState,
    train_detector,
)
from unbackdoor.detection.voc import VocImages, check_classes, load_voc
from unbackdoor.devices import (
    Precision,
    describe_device,
    forget_peak,
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
from unbackdoor.outputs import (
    TrainedFiles,
    name_trained,
    refuse_trained,
    versions,
    write_trained,
)
from unbackdoor.resume import as_texts, read_state, write_state
from unbackdoor.settings import DetectionSettings, DeviceName, PrecisionName
from unbackdoor.types import OnStep, Say

KIND = "detector"
GROUPS = ("network", "momentum", "progress")


class Opened(NamedTuple):
    """A detector from a file.

    Attributes:
        detector: In eval mode, on the CPU.
        classes: Names, by number.
        settings: Of its training.
        size: Side of the images that its backbone was trained on, in pixels.
        trained_on: ``VocImages.fingerprints`` of the images of its training.
        record: All that stands beside the file.
        sha256: Of the file.
        name: Of the file.
    """

    detector: nn.Module
    classes: tuple[str, ...]
    settings: DetectionSettings
    size: int
    trained_on: frozenset[str]
    record: Mapping[str, Any]
    sha256: str
    name: str


def train_file(
    source: Source,
    data: str,
    out: Path,
    settings: DetectionSettings,
    *,
    name: str = "trainval",
    classes: Sequence[str] | None = None,
    stages: Sequence[str] = (),
    device: DeviceName = "auto",
    precision: PrecisionName = "auto",
    overwrite: bool = False,
    resume: bool = False,
    say: Say = print,
    on_step: OnStep | None = None,
) -> TrainedFiles:
    """Train a Faster R-CNN on the backbone in ``source``, and write it with its record.

    The state is kept beside ``out`` now and then, so that a killed run can be continued by
    ``resume``. The backbone's file is never changed.

    Args:
        data: ``voc:DIR``, see ``load_voc``.
        out: A ``.safetensors`` file.
        name: The set to train on.
        classes: See ``load_voc``.
        stages: See ``find_levels``.
        overwrite: Replace existing files and the state of an earlier run.
        resume: Continue from the state of an earlier run with the same input and settings.
        say: Receives what happens, line by line.
        on_step: Called after every step with the number of steps done and of all steps.

    Raises:
        UnbackdoorError: See ``errors``; nothing is written then but the state.
    """
    started = time.monotonic()
    files = plan_files(source.checkpoint, out, overwrite=overwrite, resume=resume)
    images = load_voc(data, name, classes=classes)
    loaded = open_backbone(source)
    levels = find_levels(loaded.backbone.body, source.arch, stages)
    where = pick_device(device)
    forget_peak(where)
    how = pick_precision(precision, where)
    detector = make_detector(
        loaded.backbone, levels, settings, classes=len(images.classes), precision=how
    )
    say(describe(images, levels, settings))
    of = {
        "backbone": loaded.checkpoint.sha256,
        **describe_network(source, loaded),
        "stages": json.dumps(levels),
        "images": images.fingerprint,
        "device": str(where),
        "precision": how,
        **as_texts(settings),
    }
    with told_of_memory(where):
        history, earlier = _train(
            detector,
            images,
            settings,
            files.state,
            of,
            device=where,
            resume=resume,
            say=say,
            on_step=on_step,
        )
    record = {
        "schema": 1,
        "kind": KIND,
        "backbone": {
            "name": loaded.checkpoint.path.name,
            "sha256": loaded.checkpoint.sha256,
            "nesting": list(loaded.match.nesting),
            "prefix": loaded.match.prefix,
        },
        "arch": public_name(source.arch),
        "head": source.head,
        "pixels": {**_pixels(loaded.backbone), "size": loaded.size},
        "stages": [level.stage for level in levels],
        "classes": list(images.classes),
        "data": {
            "source": Path(data).name,
            "set": name,
            "images": len(images),
            "objects": sum(len(there.labels) for there in images.objects),
            "sha256": images.fingerprint,
            "each": sorted(images.fingerprints),
        },
        "settings": asdict(settings),
        "history": [[round(loss, 4), round(seconds, 1)] for loss, seconds in history],
        **circumstances(where, how),
        "seconds": round(time.monotonic() - started + earlier, 1),
        "seconds_of_training": round(sum(epoch.seconds for epoch in history), 1),
    }
    if not all(value.isfinite().all() for value in detector.state_dict().values()):
        raise DivergedError(
            "the last step left NaN or infinite weights; pass a smaller --learning-rate"
        )
    write_trained(files, detector.state_dict(), record, overwrite=overwrite or resume, say=say)
    return files


def plan_files(backbone: Path, out: Path, *, overwrite: bool, resume: bool) -> TrainedFiles:
    """Return the files to write, after all that could forbid writing them has been checked.

    Raises:
        OutputError: If ``out`` has another suffix, is the input, or exists; as ``check_output``; or
            if an interrupted run left its state and it is neither resumed nor overwritten.
        SettingsError: If it shall both start again and go on.
    """
    if out.suffix != ".safetensors":
        raise OutputError(f"{out}: a detector's file ends in .safetensors")
    files = name_trained(out)
    for path in files:
        check_output(path, overwrite=True, inputs=[backbone])
    refuse_trained(files, overwrite=overwrite, resume=resume)
    return files


def open_detector(path: Path, *, arch: str | None = None, precision: Precision = "fp32") -> Opened:
    """Open a detector that :func:`train_file` wrote; the record beside it says what it is.

    Args:
        arch: Where the record alone cannot build the network: ``path/to/file.py:function``.
        precision: See ``Pyramid``.

    Raises:
        CheckpointError: If file or record are missing, damaged or of another kind.
        MismatchError: If the tensors are not those of this detector.
        ArchitectureError: See ``build`` and ``find_levels``; or if the record names a file of code
            and ``arch`` does not.
    """
    beside = path.with_suffix(".json")
    try:
        record = json.loads(beside.read_text(encoding="utf-8"))
        if record["kind"] != KIND or record["schema"] != 1:
            raise ValueError(f"its kind is {record['kind']!r}")
        named, head = str(record["arch"]), record["head"]
        pixels, stages = record["pixels"], [str(stage) for stage in record["stages"]]
        classes = tuple(str(word) for word in record["classes"])
        settings = DetectionSettings(**_numbers(record["settings"]))
        mean, std, size = pixels["mean"], pixels["std"], pixels["size"]
        mean, std = ([float(value) for value in row] for row in (mean, std))
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"images of {size!r} pixels")
        trained_on = frozenset(str(each) for each in record["data"]["each"])
        if not classes or not stages or not (head is None or isinstance(head, str)):
            raise ValueError("it names no class, no stage, or no head")
        check_classes(classes)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        DataError,
        SettingsError,
    ) as error:
        raise CheckpointError(
            f"{beside}: is no detector's record ({type(error).__name__}: {error}); it lies beside "
            "the tensors, as detect train writes it"
        ) from error
    if arch is None and ".py" in named:  # a record from elsewhere shall not choose code to run
        raise ArchitectureError(
            f"{beside}: its network comes from a file of code ({named}), which is run only if you "
            "name it yourself: --arch path/to/file.py:function"
        )
    checkpoint = read_checkpoint(path)
    architecture = build(arch or named, head=head)
    backbone = Backbone(architecture.network, architecture.heads, mean=mean, std=std).eval()
    levels = find_levels(backbone.body, arch or named, stages)
    detector = make_detector(backbone, levels, settings, classes=len(classes), precision=precision)
    _fill(detector, checkpoint.tree, path)
    return Opened(
        detector.eval(),
        classes,
        settings,
        size,
        trained_on,
        record,
        checkpoint.sha256,
        path.name,
    )


def describe(images: VocImages, levels: Sequence[Level], settings: DetectionSettings) -> str:
    """Return one line about what will be trained on what."""
    objects = sum(len(there.labels) for there in images.objects)
    stages = ", ".join(f"{level.stage} (stride {level.stride})" for level in levels)
    return (
        f"{images.name}: {len(images)} images, {objects} objects of {len(images.classes)} classes "
        f"({', '.join(images.classes)}), scaled to {settings.shorter} pixels; stages {stages}"
    )


def circumstances(device: torch.device, precision: Precision) -> dict[str, Any]:
    """Return where and with what a number was made, as JSON can hold it."""
    return {
        "device": describe_device(device),
        "precision": precision,
        "peak_memory": peak_memory(device),
        "versions": versions(),
    }


def _train(
    detector: nn.Module,
    images: VocImages,
    settings: DetectionSettings,
    path: Path,
    of: dict[str, str],
    *,
    device: torch.device,
    resume: bool,
    say: Say,
    on_step: OnStep | None,
) -> tuple[tuple[Epoch, ...], float]:
    """Return the history of all epochs, and the seconds of those that earlier runs trained."""
    state = _load(path, of) if resume else None
    if state is None:
        path.unlink(missing_ok=True)  # of another run, which is being overwritten
    else:
        say(f"resuming after step {state.step}")
    done = () if state is None else (*state.history, state.unfinished)

    def on_epoch(number: int, epoch: Epoch) -> None:
        say(f"epoch {number}/{settings.epochs}  loss {epoch.loss:.3f}  {epoch.seconds:.0f} s")

    history = train_detector(
        detector,
        images,
        settings,
        device=device,
        state=state,
        on_step=on_step,
        on_epoch=on_epoch,
        on_state=lambda reached: _save(path, reached, of),
    )
    return history, sum(epoch.seconds for epoch in done)


def _save(path: Path, state: TrainingState, of: dict[str, str]) -> None:
    progress = torch.tensor([state.step, *state.unfinished], dtype=torch.float64)
    groups = {
        "network": state.network,
        "momentum": state.momentum,
        "progress": {"numbers": progress},
    }
    write_state(path, state.history, groups, of)


def _load(path: Path, of: dict[str, str]) -> TrainingState:
    history, groups = read_state(path, of, groups=GROUPS, entry=Epoch)
    step, loss, seconds = groups["progress"]["numbers"].tolist()
    return TrainingState(
        int(step),
        tuple(history),
        Epoch(loss, seconds),
        groups["network"],
        groups["momentum"],
    )


def _fill(detector: nn.Module, tree: Tree, path: Path) -> None:
    wanted = detector.state_dict()
    given = {key: value for key, value in tree.items() if isinstance(value, Tensor)}
    wrong = sorted(
        key
        for key in wanted.keys() | given.keys()
        if key not in wanted or key not in given or wanted[key].shape != given[key].shape
    )
    if wrong:
        raise MismatchError(
            f"{path}: holds other tensors than its record describes, {len(wrong)} of them, first "
            f"{wrong[0]}"
        )
    if not all(value.isfinite().all() for value in given.values()):
        raise CheckpointError(f"{path}: holds NaN or infinite weights")
    detector.load_state_dict(given)


def _numbers(values: Any) -> dict[str, Any]:
    """Return settings from a file, if each is of its own type."""
    defaults = asdict(DetectionSettings())
    for name, value in dict(values).items():
        if name not in defaults or type(value) is not type(defaults[name]):
            raise ValueError(f"{name} is {value!r}")
    return dict(values)


def _pixels(backbone: Backbone) -> dict[str, list[float]]:
    return {"mean": backbone.mean.flatten().tolist(), "std": backbone.std.flatten().tolist()}
