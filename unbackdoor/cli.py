"""The command line: reads arguments, calls, prints. No logic, and no torch until a command runs."""

import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict, Toml

from unbackdoor import __version__
from unbackdoor.errors import SettingsError, UnbackdoorError
from unbackdoor.progress import display
from unbackdoor.settings import PRESETS, PurifySettings, Whole, flatten

NO_SETTINGS = {  # arguments of `purify` that belong on the command line, and our own commands
    *("purify", "demo", "checkpoint", "config", "preset", "arch", "images", "out", "nesting"),
    *("prefix", "head", "mean", "std", "size", "limit", "max_broken", "max-broken", "device"),
    *("precision", "resume", "force", "dry_run", "dry-run"),
}

app = App(
    name="unbackdoor",
    suppress_keyboard_interrupt=False,
    version=__version__,
    help="Remove backdoors from pre-trained vision backbones with unlabeled images.",
)


def fill_settings(_: App, __: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take what no flag gives from ``--config``, and what that lacks from ``--preset``."""
    given = {argument.name: argument.tokens[0].value for argument in arguments if argument.tokens}
    if path := given.get("--config"):
        if not Path(path).is_file():
            raise SettingsError(f"--config {path}: no such file")
        check_config(Path(path))
        Toml(path, use_commands_as_keys=False)(app, (), arguments)
    if name := given.get("--preset"):
        if name not in PRESETS:
            raise SettingsError(f"--preset {name!r} is unknown; there are {', '.join(PRESETS)}")
        preset = dict(PRESETS[name])
        Dict(preset, use_commands_as_keys=False, source=f"preset {name}")(app, (), arguments)


def check_config(path: Path) -> None:
    """Refuse what is no setting in a TOML file, and fractions where a whole number belongs.

    The nearest name of an unknown key is cyclopts' to give.

    Raises:
        SettingsError: If the file is not TOML, or holds something else than settings.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"--config {path}: {error}") from error
    flags = [key for key in table if key in NO_SETTINGS]
    if flags:
        raise SettingsError(f"--config {path}: {flags[0]!r} is no setting; pass it as a flag")
    whole = {name for name, value in flatten(asdict(PurifySettings())) if type(value) is int}
    for name, value in flatten(table):
        if name in whole and type(value) is not int:
            raise SettingsError(f"--config {path}: {name} is a whole number, got {value!r}")


@app.command(config=fill_settings)
def purify(
    checkpoint: Path,
    *,
    arch: str,
    images: str,
    out: Path,
    preset: str | None = None,
    config: Path | None = None,
    settings: Annotated[PurifySettings, Parameter(name="*")] = PurifySettings(),
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    size: Whole | None = None,
    head: str | None = None,
    nesting: str | None = None,
    prefix: str | None = None,
    limit: Whole | None = None,
    max_broken: float = 0.01,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    resume: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    force: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Purify a checkpoint with unlabeled images, and write a file that drops in where it was.

    Beside OUT it writes a JSON record and an HTML report, both with label-free evidence.

    Parameters
    ----------
    checkpoint
        A safetensors or torch file, or a Hugging Face folder. It is never run and never changed.
    arch
        A timm name, torchvision/NAME, cifar/NAME, or path/to/file.py:function.
    images
        A folder, a parquet file, cifar10:DIR, fashion-mnist[:DIR], or tar shards. Labels are not
        read.
    out
        Where to write: .safetensors is flat, .pt keeps the input's nesting.
    preset
        The paper's settings: cifar10, cifar10-simclr or imagenet100.
    config
        A TOML file with settings; it goes before the preset, and flags go before it.
    mean
        Mean of the pixels, three numbers on the [0, 1] scale; the architecture's by default.
    std
        Standard deviation of the pixels, likewise.
    size
        Side of the images in pixels; the architecture's by default.
    head
        Name of the module that turns features into logits, or "none".
    nesting
        Dotted place of the state dict in the file, where several fit.
    prefix
        Prefix of its keys, where several fit.
    limit
        Use this many of the images, drawn by the seed.
    max_broken
        Share of the images that may be broken.
    device
        Where to compute.
    precision
        bf16 runs the networks in bfloat16; auto does where the device computes it.
    resume
        Continue an interrupted run.
    dry_run
        Say what would be matched, measure two steps, write nothing.
    force
        Replace existing outputs.
    """
    from unbackdoor import jobs  # imports torch, so not before it is needed

    source = jobs.Source(checkpoint, arch, mean, std, size, head, nesting, prefix)
    options: dict[str, Any] = {
        "limit": limit,
        "max_broken": max_broken,
        "device": device,
        "precision": precision,
    }
    if dry_run:
        jobs.dry_run(source, images, out, settings, **options)
        return
    try:
        with display("purify") as shown:
            jobs.purify_file(
                source,
                images,
                out,
                settings,
                **options,
                overwrite=force,
                resume=resume,
                say=shown.say,
                on_step=shown.on_step,
            )
    except KeyboardInterrupt:
        if jobs.name_outputs(out).state.exists():
            print("run the same command with --resume to continue", file=sys.stderr)
        raise


@app.command
def demo(
    *,
    out: Path = Path("unbackdoor-demo"),
    seed: Whole = 0,
    force: Annotated[bool, Parameter(negative="")] = False,
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 for errors that the user can mend."""
    try:
        app(arguments, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2  # cyclopts has printed it
    except UnbackdoorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except MemoryError as error:
        print(f"error: out of memory ({error}); pass a smaller --batch-size", file=sys.stderr)
        return 2
    return 0
