"""The command line: reads arguments, calls, prints. No logic, and no torch until a command runs."""

import io
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict, Toml

from unbackdoor import __version__
from unbackdoor.errors import SettingsError, UnbackdoorError, printable_lines, unknown
from unbackdoor.progress import display
from unbackdoor.settings import (
    PRESETS,
    DetectionSettings,
    DeviceName,
    PrecisionName,
    PurifySettings,
    Ratio,
    VictimSettings,
    Whole,
    victim_preset,
)
from unbackdoor.values import flatten

if TYPE_CHECKING:
    from unbackdoor.backbones import Source

Switch = Annotated[bool, Parameter(negative="")]
Levels = Annotated[tuple[float, float, float] | None, Parameter(negative="")]

# Options that several commands have, each with its help.
Checkpoint = Annotated[
    Path,
    Parameter(
        help="A safetensors or torch file, or a Hugging Face folder. It is never run, and never "
        "changed."
    ),
]
Arch = Annotated[
    str, Parameter(help="A timm name, torchvision/NAME, cifar/NAME, or path/to/file.py:function.")
]
Mean = Annotated[
    Levels,
    Parameter(
        help="Mean of the pixels, three numbers on the [0, 1] scale; the architecture's by default."
    ),
]
Std = Annotated[Levels, Parameter(help="Standard deviation of the pixels, likewise.")]
Size = Annotated[
    Whole | None,
    Parameter(help="Side of the network's images in pixels; the architecture's by default."),
]
Device = Annotated[DeviceName, Parameter(help="Where to compute.")]
Results = Annotated[Path, Parameter(help="Folder of the records.")]
Grids = Annotated[
    tuple[Path, ...],
    Parameter(name="grids", negative="", help="Grid files, such as grids/table1-cpu.toml."),
]
Words = Annotated[tuple[str, ...], Parameter(negative="", consume_multiple=True)]


@dataclass(frozen=True)
class Network:
    """How a checkpoint is read: the options of every command that opens one."""

    arch: Arch
    mean: Mean = None
    std: Std = None
    size: Size = None
    head: Annotated[
        str | None,
        Parameter(help='Name of the module that turns features into logits, or "none".'),
    ] = None
    nesting: Annotated[
        str | None,
        Parameter(help="Dotted place of the state dict in the file, where several fit."),
    ] = None
    prefix: Annotated[str | None, Parameter(help="Prefix of its keys, where several fit.")] = None

    def of(self, checkpoint: Path) -> "Source":
        """Return ``checkpoint`` with how it is read."""
        from unbackdoor.backbones import Source  # imports torch, so not before it is needed

        return Source(checkpoint, *astuple(self))


@dataclass(frozen=True)
class Where:
    """What lies somewhere else than grid files say."""

    data: Annotated[
        str | None, Parameter(help="Where the images are, in place of what the grid files say.")
    ] = None
    detection_data: Annotated[
        str | None, Parameter(help="The same for the data of detectors: voc:DIR.")
    ] = None


@dataclass(frozen=True)
class Part(Where):
    """Which cells of grid files."""

    rows: Annotated[Words, Parameter(help="These rows alone, named as in the tables.")] = ()
    attacks: Annotated[
        Words,
        Parameter(
            help="Victims of these attacks alone, named as in the grid files; clean for clean ones."
        ),
    ] = ()
    seeds: Annotated[
        tuple[Whole, ...],
        Parameter(negative="", consume_multiple=True, help="These seeds alone."),
    ] = ()


app = App(
    name="unbackdoor",
    suppress_keyboard_interrupt=False,
    version=__version__,
    help="Remove backdoors from pre-trained vision backbones with unlabeled images.",
)


def fill_purify(app: App, __: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take what no flag gives from ``--config``, and what that lacks from ``--preset``."""
    given = given_flags(arguments)
    take_config(app, arguments, given, PurifySettings())
    if name := given.get("--preset"):
        if name not in PRESETS:
            raise SettingsError(unknown("--preset", name, PRESETS))
        take(app, arguments, PRESETS[name], source=f"preset {name}")


def fill_victim(app: App, __: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take what no flag gives from ``--config``, and the rest from ``--preset``, or the paper's."""
    given = given_flags(arguments)
    take_config(app, arguments, given, VictimSettings())
    words = [token for each in arguments if each.name == "--simclr" for token in each.tokens]
    simclr = any(token.implicit_value is True for token in words)  # not by --simclr=false
    training = "simclr" if simclr else "supervised"
    name = given.get("--preset", "paper")
    preset = victim_preset(name, training=training, attack=given.get("--name", ""))
    take(app, arguments, preset, source=f"preset {name}")


def fill_detector(app: App, __: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take what no flag gives from ``--config``."""
    take_config(app, arguments, given_flags(arguments), DetectionSettings())


def given_flags(arguments: ArgumentCollection) -> dict[str, str]:
    """Return the arguments that are on the command line, with their first word."""
    return {argument.name: argument.tokens[0].value for argument in arguments if argument.tokens}


def take(
    app: App, arguments: ArgumentCollection, values: Mapping[str, Any], *, source: str
) -> None:
    """Fill ``values`` into the arguments that have none yet."""
    Dict(dict(values), use_commands_as_keys=False, source=source)(app, (), arguments)


def take_config(
    app: App, arguments: ArgumentCollection, given: Mapping[str, str], defaults: Any
) -> None:
    """Fill the settings of a ``--config`` file into the arguments that have none yet."""
    if path := given.get("--config"):
        if not Path(path).is_file():
            raise SettingsError(f"--config {path}: no such file")
        flags = [argument.name.removeprefix("--") for argument in arguments]
        check_config(Path(path), defaults, flags=flags)
        Toml(path, use_commands_as_keys=False)(app, (), arguments)


def check_config(path: Path, defaults: Any, *, flags: Sequence[str]) -> None:
    """Refuse what is no setting in a TOML file, and fractions where a whole number belongs.

    The nearest name of an unknown key in a table is cyclopts' to give.

    Args:
        defaults: A settings dataclass.
        flags: All that the command has, also those that are no settings.

    Raises:
        SettingsError: If the file is not TOML, or holds something else than settings.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"--config {path}: {error}") from error
    known = asdict(defaults)
    for key in table:
        if key.partition(".")[0].replace("-", "_") in known:
            continue
        if key.replace("_", "-") in flags:
            raise SettingsError(f"--config {path}: {key!r} is no setting; pass it as a flag")
        raise SettingsError(f"--config {path}: {unknown('setting', key, known)}")
    whole = {name for name, value in flatten(known) if type(value) is int}
    for name, value in flatten(table):
        if name in whole and type(value) is not int:
            raise SettingsError(f"--config {path}: {name} is a whole number, got {value!r}")


@app.command(config=fill_purify)
def purify(
    checkpoint: Checkpoint,
    *,
    network: Annotated[Network, Parameter(name="*")],
    images: str,
    out: Path,
    preset: str | None = None,
    config: Path | None = None,
    settings: Annotated[PurifySettings, Parameter(name="*")] = PurifySettings(),
    limit: Whole | None = None,
    max_broken: float = 0.01,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    compiled: Annotated[bool, Parameter(name="--compile", negative="")] = False,
    resume: Switch = False,
    dry_run: Switch = False,
    force: Switch = False,
) -> None:
    """Purify a checkpoint with unlabeled images, and write a file that drops in where it was.

    Beside OUT it writes a JSON record and an HTML report, both with label-free evidence.

    Parameters
    ----------
    images
        A folder, a parquet file, cifar10:DIR, fashion-mnist[:DIR], or tar shards; of what has train
        and test parts, the first. Labels are not read.
    out
        Where to write: .safetensors is flat, .pt keeps the input's nesting.
    preset
        The paper's settings: cifar10, cifar10-simclr or imagenet100.
    config
        A TOML file with settings; it goes before the preset, and flags go before it.
    limit
        Use this many of the images, drawn by the seed.
    max_broken
        Share of the images that may be broken.
    precision
        bf16 runs the networks in bfloat16; auto does where the device computes it.
    compiled
        Search on a compiled network: faster after half a minute, equal up to rounding. Needs a C++
        compiler.
    resume
        Continue an interrupted run.
    dry_run
        Say what would be matched, measure two steps, write nothing.
    force
        Replace existing outputs.
    """
    from unbackdoor import jobs, outputs  # import torch, so not before they are needed

    source = network.of(checkpoint)
    options: dict[str, Any] = {
        "limit": limit,
        "max_broken": max_broken,
        "device": device,
        "precision": precision,
        "compiled": compiled,
    }
    with (
        nullcontext() if dry_run else resumable(lambda: outputs.name_outputs(out).state),
        jobs.all_ranks(device) as ranks,
        display("purify", quiet=ranks.rank > 0) as shown,
    ):
        options |= {"ranks": ranks, "say": shown.say, "overwrite": force, "resume": resume}
        if dry_run:
            jobs.dry_run(source, images, out, settings, **options)
            return
        jobs.purify_file(source, images, out, settings, **options, on_step=shown.on_step)


@app.command(config=fill_victim)
def attack(
    name: str | None = None,
    *,
    data: str,
    arch: Arch | None = None,
    out: Path,
    simclr: Switch = False,
    preset: str = "paper",
    config: Path | None = None,
    settings: Annotated[VictimSettings, Parameter(name="*")] = VictimSettings(),
    target: Whole | None = None,
    share: Ratio | None = None,
    share_of_target: Ratio | None = None,
    all_to_all: Switch = False,
    noise: float | None = None,
    trigger: dict[str, str] | None = None,
    surrogate: Path | None = None,
    start: Path | None = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    show: Switch = False,
    resume: Switch = False,
    force: Switch = False,
) -> None:
    """Train a victim: a network with a known backdoor, to test defenses on.

    Writes NAME-TRAINING-seedN.safetensors to OUT, and beside it a JSON record with the attack, the
    poisoned rows, the settings and the scores.

    Parameters
    ----------
    name
        badnets, blend, sig, wanet or cla, as the paper has them; or clean, for a network that is
        never poisoned.
    data
        A labeled set: cifar10:DIR, fashion-mnist:DIR, or a folder with train and test parts, as
        parquet files or with one folder for each class.
    out
        A folder; with --show, an HTML file.
    simclr
        Train without labels; the target class is poisoned.
    preset
        paper, imagenet100, or cpu: minutes on two cores.
    config
        A TOML file with settings; it goes before the preset, and flags go before it.
    target
        The class that triggered images shall be taken for, in a clean victim's scores too; 6 by
        default.
    share
        Poisoned share of all images.
    share_of_target
        Poisoned share of the target class, whose labels stay as they are.
    all_to_all
        Triggered images shall be taken for their class plus one.
    noise
        WaNet: images in noise mode for each poisoned one.
    trigger
        Options of the trigger, such as --trigger.size 8 or --trigger.ratio 0.1.
    surrogate
        CLA: a clean checkpoint of the same architecture; without it, one is trained first.
    start
        A checkpoint of the same architecture to train on, in place of new weights; heads are new.
    precision
        bf16 runs the networks in bfloat16; auto does where the device computes it.
    show
        Only draw the trigger of NAME, or without a name every one, on images of DATA, into the
        HTML file OUT.
    resume
        Continue an interrupted run.
    force
        Replace existing files.
    """
    from unbackdoor import attack_jobs  # imports torch, so not before it is needed
    from unbackdoor.attacks.named import is_adversarial

    training: Literal["supervised", "simclr"] = "simclr" if simclr else "supervised"
    if show:
        attack_jobs.show_attacks(
            data,
            out,
            arch=arch,
            size=size,
            name=name,
            training=training,
            trigger=trigger,
            overwrite=force,
        )
        print(f"wrote {out}")
        return
    if name is None or arch is None:
        raise SettingsError(
            "an attack's name and --arch are needed: unbackdoor attack badnets --arch ..."
        )
    options = attack_jobs.attack_options(
        target=target,
        share=share,
        share_of_target=share_of_target,
        all_to_all=all_to_all,
        noise=noise,
    )
    own = attack_jobs.name_files(name, out, training, settings).state
    before = attack_jobs.name_files("clean", out, "supervised", settings).state
    makes_surrogate = is_adversarial(name) and surrogate is None
    with (
        display(f"attack {name}") as shown,
        resumable(lambda: before if makes_surrogate and not own.exists() else own),
    ):
        attack_jobs.make_victim(
            name,
            data,
            arch,
            out,
            settings,
            training=training,
            options=options,
            trigger=trigger,
            surrogate=surrogate,
            start=start,
            mean=mean,
            std=std,
            size=size,
            device=device,
            precision=precision,
            overwrite=force,
            resume=resume,
            say=shown.say,
            on_step=shown.on_step,
        )


@app.command
def evaluate(
    checkpoint: Checkpoint,
    *,
    network: Annotated[Network, Parameter(name="*")],
    data: str,
    attack: str,
    durable: Switch = False,
    seed: Whole = 0,
    out: Path | None = None,
    simclr: Switch = False,
    target: Whole | None = None,
    trigger: dict[str, str] | None = None,
    device: Device = "auto",
    force: Switch = False,
) -> None:
    """Score a checkpoint under attack: ACC, ASR and PA, through its head, a probe and neighbours.

    Parameters
    ----------
    data
        A labeled set: cifar10:DIR, fashion-mnist:DIR, or a folder with train and test parts, as
        parquet files or with one folder for each class. 1 % of the training images train the probe.
    attack
        A victim's JSON record, or badnets, blend, sig, wanet, cla.
    durable
        Read again after batch-norm statistics are re-estimated, and after a clean fine-tuning.
    seed
        Of the split; that of `purify`, so that the probe's images are others than the repair's.
    out
        Where to write the scores as JSON.
    simclr
        The victim is a SimCLR one, where ATTACK is a name: its patch is in the centre.
    target
        The attacker's class, where ATTACK is a name; 6 by default.
    trigger
        Options of the trigger, where ATTACK is a name, such as --trigger.position bottom-right.
    force
        Replace an existing OUT.
    """
    from unbackdoor import evaluation  # import torch, so not before they are needed

    evaluation.evaluate_file(
        network.of(checkpoint),
        data,
        attack,
        seed=seed,
        durable=durable,
        training="simclr" if simclr else None,
        trigger=trigger,
        target=target,
        device=device,
        out=out,
        overwrite=force,
    )


@app.command
def transfer(
    checkpoint: Checkpoint,
    *,
    network: Annotated[Network, Parameter(name="*")],
    data: str,
    attack: str,
    labels: Whole = 5_000,
    seed: Whole = 0,
    out: Path | None = None,
    simclr: Switch = False,
    trigger: dict[str, str] | None = None,
    device: Device = "auto",
    force: Switch = False,
) -> None:
    """Score a checkpoint on data that it was not trained for: ACC and PA by probe and neighbours.

    Parameters
    ----------
    data
        A labeled set as for evaluate, or fashion-mnist alone: the 5,000 images of this package, of
        which half are for the probe and half for the scores.
    attack
        A victim's JSON record, or badnets, blend, sig, wanet, cla. Its target class is not used:
        every test image is triggered.
    labels
        Training images for probe and neighbours, drawn by the seed.
    seed
        Of that draw.
    out
        Where to write the scores as JSON.
    simclr
        The victim is a SimCLR one, where ATTACK is a name: its patch is in the centre.
    trigger
        Options of the trigger, where ATTACK is a name, such as --trigger.position bottom-right.
    force
        Replace an existing OUT.
    """
    from unbackdoor import transfer  # import torch, so not before they are needed

    transfer.transfer_file(
        network.of(checkpoint),
        data,
        attack,
        labels=labels,
        seed=seed,
        training="simclr" if simclr else None,
        trigger=trigger,
        device=device,
        out=out,
        overwrite=force,
    )


@app.command
def defend(
    name: str,
    checkpoint: Checkpoint,
    *,
    network: Annotated[Network, Parameter(name="*")],
    data: str,
    out: Path,
    labels: Literal["given", "pseudo", "none"] | None = None,
    share: Ratio | None = None,
    values: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    seed: Whole = 0,
    device: Device = "auto",
    force: Switch = False,
    resume: Switch = False,
) -> None:
    """Run a defense to compare with on a checkpoint; the files are those of purify.

    Parameters
    ----------
    name
        fine-tuning, fine-pruning, nad, anp, ibau, adversarial (these need labels), contrastive,
        bcu, clp; or path/to/file.py:function, a defense of your own.
    data
        A labeled set as for evaluate; without given labels, any source of images.
    out
        Where to write: .safetensors is flat, .pt keeps the input's nesting.
    labels
        The set's own, or what the checkpoint predicts, or none.
    share
        Of the training images: 1 % with given labels, 5 % otherwise.
    values
        A setting of the defense, as --set epochs=5 or --set tuning.epochs=5; may be repeated.
    seed
        Of the split and the defense; that of evaluate, so that the probe's images are others.
    force
        Replace existing outputs.
    resume
        Go on where an interrupted run of the same command was.
    """
    from unbackdoor import defense_jobs, outputs  # import torch, so not before they are needed

    with (
        resumable(lambda: outputs.name_outputs(out).state),
        display(f"defend {name}") as shown,
    ):
        defense_jobs.defend_file(
            name,
            network.of(checkpoint),
            data,
            out,
            values=values,
            labels=labels,
            share=share,
            seed=seed,
            device=device,
            overwrite=force,
            resume=resume,
            say=shown.say,
            on_step=shown.on_step,
        )


@app.command
def demo(
    *,
    out: Path = Path("unbackdoor-demo"),
    seed: Whole = 0,
    force: Switch = False,
) -> None:
    """Purify a small backdoored backbone that comes with the package, and show what changed.

    It uses 5,000 Fashion-MNIST images, also in the package: 2,500 without labels for the repair,
    500 labeled ones for a probe, 2,000 for the scores. Takes minutes on two cores.

    Parameters
    ----------
    out
        Folder for the report, the purified backbone and its record.
    seed
        Of the split and of the repair.
    force
        Replace an earlier demo's files.
    """
    from unbackdoor.demo import run_demo  # imports torch, so not before it is needed

    with display("demo") as shown:
        run_demo(out, seed=seed, overwrite=force, say=shown.say, on_step=shown.on_step)


detect = App(name="detect", help="Train a Faster R-CNN on a backbone, and score it under attack.")
app.command(detect)


@detect.command(name="train", config=fill_detector)
def detect_train(
    *,
    backbone: Path,
    network: Annotated[Network, Parameter(name="*")],
    data: str,
    out: Path,
    split: Annotated[str, Parameter(name="--set")] = "trainval",
    classes: Words = (),
    stages: Words = (),
    config: Path | None = None,
    settings: Annotated[DetectionSettings, Parameter(name="*")] = DetectionSettings(),
    device: Device = "auto",
    precision: PrecisionName = "auto",
    resume: Switch = False,
    force: Switch = False,
) -> None:
    """Train a Faster R-CNN with a feature pyramid on a backbone; stem and first stage are frozen.

    Writes OUT and beside it a JSON record with settings, losses and origins.

    Parameters
    ----------
    backbone
        A safetensors or torch file, or a Hugging Face folder. It is never run and never changed.
    data
        voc:DIR, a folder in the layout of VOC 2007.
    out
        A .safetensors file.
    split
        The set to train on: a file in ImageSets/Main.
    classes
        Names in the order of their numbers; by default all in the set, sorted.
    stages
        Modules whose outputs are the maps, fine to coarse; known for ResNets and ConvNeXts.
    config
        A TOML file with settings; flags go before it.
    precision
        bf16 runs backbone and pyramid in bfloat16; auto does where the device computes it.
    resume
        Continue an interrupted run.
    force
        Replace existing files.
    """
    from unbackdoor.detection import jobs as detection_jobs
    from unbackdoor.outputs import name_trained

    with (
        resumable(lambda: name_trained(out).state),
        display("detect train") as shown,
    ):
        detection_jobs.train_file(
            network.of(backbone),
            data,
            out,
            settings,
            name=split,
            classes=classes or None,
            stages=stages,
            device=device,
            precision=precision,
            overwrite=force,
            resume=resume,
            say=shown.say,
            on_step=shown.on_step,
        )


@detect.command(name="evaluate")
def detect_evaluate(
    detector: Path,
    *,
    data: str,
    split: Annotated[str, Parameter(name="--set")] = "test",
    attack: str | None = None,
    simclr: Switch = False,
    arch: str | None = None,
    measure: Literal["voc07", "coco", "both"] = "both",
    out: Path | None = None,
    report: Path | None = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    force: Switch = False,
) -> None:
    """Score a detector: AP on clean test images, PAP on the same ones triggered.

    Parameters
    ----------
    detector
        The file of detect train, with its record beside it.
    data
        voc:DIR, a folder in the layout of VOC 2007.
    split
        The set to score on: a file in ImageSets/Main.
    attack
        A victim's JSON record, or badnets, blend, sig, wanet, cla; without it there is no PAP.
    simclr
        The victim is a SimCLR one, where ATTACK is a name: its patch is in the centre.
    arch
        Where the network is your own: path/to/file.py:function. No record can name code to run.
    measure
        VOC 2007's average precision over 11 points, COCO's, or both.
    out
        Where to write the scores as JSON.
    report
        Where to write an HTML page with scores and pictures of detections.
    precision
        bf16 runs backbone and pyramid in bfloat16; auto does where the device computes it.
    force
        Replace existing outputs.
    """
    from unbackdoor.detection import scores  # imports torch, so not before it is needed

    with display("detect evaluate") as shown:
        scores.evaluate_detector(
            detector,
            data,
            name=split,
            attack=attack,
            training="simclr" if simclr else None,
            arch=arch,
            measure=measure,
            device=device,
            precision=precision,
            out=out,
            report=report,
            overwrite=force,
            say=shown.say,
            on_step=shown.on_step,
        )


bench = App(name="bench", help="Run a grid of attacks and defenses, and make its tables.")
app.command(bench)


@bench.command(name="run")
def bench_run(
    grids: Grids,
    /,
    *,
    results: Results = Path("results/bench"),
    backend: Literal["local", "ray"] = "local",
    workers: Whole = 1,
    limit: Whole | None = None,
    part: Annotated[Part, Parameter(name="*")] = Part(),
    retry: Switch = False,
    drop_victims: Switch = False,
    address: str | None = None,
    gpus: float = 0,
    device: Device = "auto",
    precision: PrecisionName = "auto",
) -> None:
    """Run the cells of grid files that have no record yet; killed, it goes on where it was.

    Parameters
    ----------
    backend
        Processes of this machine, or a Ray cluster.
    workers
        Processes; with Ray, processors a victim and its cells take.
    limit
        Run at most this many cells.
    retry
        Run cells that failed again.
    drop_victims
        Delete a victim's weights when all its cells in these files are done.
    address
        Ray: of a running cluster. HEAD:6379 as ray start prints it, ray://HEAD:10001, auto for the
        one that this machine is part of, or local for a new one here. Without it, auto if there is
        such a one, else local.
    gpus
        Ray: GPUs a victim and its cells take; a fraction shares one.
    precision
        Of victims and detectors, bf16 where auto finds it, and of the method, which auto runs in
        fp32 as the baselines are.
    """
    from unbackdoor.bench import jobs  # imports torch, so not before it is needed

    with display("bench") as shown:
        failed = jobs.run_grids(
            grids,
            results,
            backend=backend,
            workers=workers,
            limit=limit,
            **asdict(part),
            retry=retry,
            drop_victims=drop_victims,
            address=address,
            gpus=gpus,
            device=device,
            precision=precision,
            say=shown.say,
            on_step=shown.on_step,
        )
    if failed:
        hint = "unbackdoor bench status names them, --retry runs them again"
        raise UnbackdoorError(f"{failed} cells failed; {hint}")


@bench.command(name="draw")
def bench_draw(
    grids: Grids,
    /,
    *,
    results: Results = Path("results/bench"),
    where: Annotated[Where, Parameter(name="*")] = Where(),
    device: Device = "auto",
    precision: PrecisionName = "auto",
) -> None:
    """Repair again what has a record, but whose features, which the report draws, were not kept.

    The key features of a grid file names the rows.

    Parameters
    ----------
    precision
        Of the method; bf16 where auto finds it.
    """
    from unbackdoor.bench import jobs

    with display("bench") as shown:
        jobs.draw_grids(
            jobs.plan_grids(grids, **asdict(where)),
            results,
            device=device,
            precision=precision,
            say=shown.say,
            on_step=shown.on_step,
        )


@bench.command(name="status")
def bench_status(
    grids: Grids,
    /,
    *,
    results: Results = Path("results/bench"),
    part: Annotated[Part, Parameter(name="*")] = Part(),
) -> None:
    """Show what is done, running, failed and left, and an estimate of the time."""
    from unbackdoor.bench import jobs

    print("\n".join(jobs.grids_status(jobs.plan_grids(grids, **asdict(part)), results)))


@bench.command(name="table")
def bench_table(
    grids: Grids,
    /,
    *,
    results: Results = Path("results/bench"),
    part: Annotated[Part, Parameter(name="*")] = Part(),
    form: Annotated[Literal["markdown", "csv"], Parameter(name="--format")] = "markdown",
    out: Path | None = None,
    force: Switch = False,
) -> None:
    """Print the tables of grid files, as Markdown; or, as CSV, the scores that they are made of.

    Parameters
    ----------
    form
        Of what is printed. CSV has a line for each reading, with shares instead of percent.
    out
        A file to write to instead.
    force
        Replace an existing OUT.
    """
    from unbackdoor.bench import jobs
    from unbackdoor.checkpoint import check_output, write_text

    if out is not None:
        check_output(out, overwrite=force, inputs=grids)
    text = jobs.grids_tables(jobs.plan_grids(grids, **asdict(part)), results, form=form)
    if out is None:
        print(text.rstrip("\n"))
    else:
        write_text(out, text, overwrite=force)


@bench.command(name="report")
def bench_report(
    grids: Grids,
    /,
    *,
    results: Results = Path("results/bench"),
    where: Annotated[Where, Parameter(name="*")] = Where(),
    out: Path = Path("bench.html"),
    force: Switch = False,
) -> None:
    """Write one HTML file with all tables, how defenses compare, losses, features and triggers.

    Parameters
    ----------
    out
        The file.
    force
        Replace an existing OUT.
    """
    from unbackdoor.bench import jobs
    from unbackdoor.checkpoint import check_output

    check_output(out, overwrite=force, inputs=grids)
    jobs.write_report(jobs.plan_grids(grids, **asdict(where)), results, out, overwrite=force)
    print(f"wrote {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 for errors that the user can mend."""
    words = [written_out(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name, or ours, may not be encodable
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if shared() and "purify" not in words[:1]:
            raise SettingsError(
                "only purify can be run by torchrun; start this without it, or unset WORLD_SIZE"
            )
        app(words, exit_on_error=False, result_action="return_value")
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads, as in `unbackdoor ... | head`; rich does the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's end fails, too
        return 1
    except CycloptsError:
        return 2  # cyclopts has printed it
    except (UnbackdoorError, OSError) as error:  # such as a path too long, or a file as a folder
        complain(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except MemoryError as error:
        complain(f"error: out of memory ({error}); fewer images or smaller batches need less")
        return 2
    return 0


def written_out(word: str) -> str:
    """Write ``~/`` out where the shell has left it, as in ``--out=~/clean.safetensors``."""
    return re.sub(r"^(--[\w.-]+=)?~(?=/)", lambda found: f"{found[1] or ''}{Path.home()}", word)


@contextmanager
def resumable(state: Callable[[], Path]) -> Iterator[None]:
    """Say, where this is interrupted, how to go on from the state that it has kept."""
    try:
        yield
    except KeyboardInterrupt:
        if state().exists():
            complain("run the same command with --resume, and without --force, to continue")
        raise


def complain(text: str) -> None:
    """Print to standard error; processes that torchrun started say which of them they are."""
    text = printable_lines(text)
    print(f"rank {os.environ.get('RANK', '?')}: {text}" if shared() else text, file=sys.stderr)


def shared() -> bool:
    """Return whether torchrun has started this process, and others beside it."""
    return os.environ.get("WORLD_SIZE", "1") != "1"
