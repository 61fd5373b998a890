import dataclasses
import io
import os
import resource
import signal
import subprocess
import sys
import time
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import torch
from PIL import Image

from unbackdoor.cli import app, main
from unbackdoor.networks import SMALL_NETWORKS
from unbackdoor.progress import display
from unbackdoor.settings import PurifySettings, VictimSettings
from unbackdoor.values import flatten

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "unbackdoor"]


def ask(*words):
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)


def unwrapped(capsys):
    said = capsys.readouterr()
    return " ".join((said.out + said.err).replace("│", " ").split())


@pytest.fixture
def inputs(tmp_path):
    torch.save(SMALL_NETWORKS["wrn16_1"](10).state_dict(), tmp_path / "victim.pt")
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (i * 30, 100, 0)).save(tmp_path / "photos" / f"{i}.png")
    return [
        "purify",
        str(tmp_path / "victim.pt"),
        "--arch",
        "cifar/wrn16_1",
        "--size",
        "16",
        "--images",
        str(tmp_path / "photos"),
        "--out",
        str(tmp_path / "clean.safetensors"),
        "--device",
        "cpu",
    ]


FEW = [
    "--batch-size",
    "8",
    "--changes.patches",
    "1",
    "--changes.warps",
    "3",
    "--changes.steps",
    "1",
]
QUICK = ["--epochs", "1", *FEW]


@pytest.mark.parametrize("words", [["--help"], ["purify", "--help"], ["--version"]])
def test_help_answers_at_once_and_without_torch(words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    asked = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "unbackdoor", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rpartition("|")[2].strip() for line in asked.stderr.splitlines()}
    assert "unbackdoor.cli" in imported
    assert not imported & {"torch", "torchvision", "timm", "numpy", "lightning"}
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 1  # of the processor; .3 on an idle machine, .6 on a busy one


def test_every_setting_is_a_flag():
    text = ask("purify", "--help").stdout
    for name, _ in flatten(dataclasses.asdict(PurifySettings())):
        assert f"--{name.replace('_', '-')}" in text


def test_purify_writes_its_three_files(inputs, tmp_path, capsys):
    assert main([*inputs, *QUICK]) == 0
    said = capsys.readouterr().out
    assert "matched: 80 of 80 body tensors" in said
    assert "epoch 1/1" in said
    for suffix in ("safetensors", "json", "html"):
        assert (tmp_path / f"clean.{suffix}").exists()
    assert main([*inputs, *QUICK]) == 2
    assert "exists already; pass --force" in capsys.readouterr().err
    assert main([*inputs, *QUICK, "--force"]) == 0


def test_flags_go_before_the_config_and_the_config_before_the_preset(inputs, tmp_path):
    (tmp_path / "c.toml").write_text(
        'epochs = 3\npull = 0.4\ndistill = 0.6\n[search]\nepsilon = "4/255"\n'
    )
    words = ["--preset", "imagenet100", "--config", str(tmp_path / "c.toml"), *QUICK]
    words += ["--search.steps", "1"]
    _, bound, _ = app.parse_args([*inputs, *words], exit_on_error=False, print_error=False)
    settings = dataclasses.asdict(bound.arguments["settings"])
    assert settings["epochs"] == 1  # a flag
    assert settings["search"]["steps"] == 1  # a flag beside a table
    assert settings["search"]["epsilon"] == 4 / 255  # the file
    assert (settings["pull"], settings["distill"]) == (0.4, 0.6)  # the file
    assert settings["learning_rate"] == 0.05  # the preset
    assert settings["momentum"] == 0.9  # the default


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--search.stepps", "3"], "Did you mean --search.steps?"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--search.epsilon", "8"], "for 8 grey levels pass 8/255"),
        (["--search.epsilon", "1/0"], "1/0"),
        (["--preset", "cifar"], "--preset 'cifar' is unknown; did you mean 'cifar10'?"),
        (["--config", "none.toml"], "--config none.toml: no such file"),
        (["--batch-norm", "off"], "batch"),
        (["--arch", "cifar/wrn99"], "unknown"),
        (["--images", "no/such/folder"], "no/such/folder"),
        (["--mean", "123", "117", "104"], "[0, 1]"),
    ],
)
def test_a_users_error_is_one_message_and_exit_code_2(words, message, inputs, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    kept = inputs
    for name in ("--arch", "--images"):
        if name in words:
            at = inputs.index(name)
            kept = inputs[:at] + inputs[at + 2 :]
    assert main([*kept, *QUICK[2:], *words]) == 2
    said = unwrapped(capsys)
    assert message in said
    assert "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before


WHOLE_NUMBERS = [
    (command, argument.name)
    for command in ("purify", "demo", "attack", "evaluate", "transfer", "detect train")
    for argument in reduce(getitem, command.split(), app).assemble_argument_collection()
    if argument.hint in (int, int | None)
]
NEEDED = {
    "purify": ["x.pt", "--arch", "x", "--images", "x", "--out", "x"],
    "demo": [],
    "attack": ["badnets", "--data", "x", "--arch", "x", "--out", "x"],
    "evaluate": ["x.pt", "--arch", "x", "--data", "x", "--attack", "badnets"],
    "transfer": ["x.pt", "--arch", "x", "--data", "x", "--attack", "badnets"],
    "detect train": ["--backbone", "x", "--arch", "x", "--data", "x", "--out", "x"],
}


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        *((command, flag, "2.5") for command, flag in WHOLE_NUMBERS),
        *(("purify", "--epochs", value) for value in ("2.0", "1e2", "two")),
    ],
)
def test_a_whole_number_is_never_rounded(command, flag, value, capsys):
    assert main([*command.split(), *NEEDED[command], flag, value]) == 2
    said = unwrapped(capsys)
    assert f"Invalid value for {flag}: '{value}' is not a whole number" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "augment", "blur"),
    [
        ("badnets", "shift", 0.0),
        ("cla", "none", 0.0),  # the paper's: without augmentation
        ("cla --augment shift", "shift", 0.0),  # a flag goes first
        ("badnets --simclr", "views", 0.5),
        ("badnets --simclr=true", "views", 0.5),
        ("badnets --simclr=false", "shift", 0.0),
        ("blend --simclr", "views", 0.0),  # the paper's: without blur
        ("blend --simclr --preset cpu", "views", 0.0),
        ("sig --preset imagenet100", "views", 0.0),
    ],
)
def test_an_attacks_preset_has_what_the_paper_says_of_it(words, augment, blur):
    words = f"attack {words} --data x --arch x --out x".split()
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    settings = bound.arguments.get("settings", VictimSettings())
    assert (settings.augment, settings.views.blur) == (augment, blur)


def test_the_whole_numbers_are_found():
    found = {flag for _, flag in WHOLE_NUMBERS}
    assert {"--epochs", "--batch-size", "--search.steps", "--seed", "--size", "--limit"} <= found


def test_an_unknown_name_in_a_config_is_answered_with_the_nearest(inputs, tmp_path, capsys):
    (tmp_path / "c.toml").write_text("[search]\nepsilom = 0.1\n")
    assert main([*inputs, "--config", str(tmp_path / "c.toml")]) == 2
    assert "Did you mean --search.epsilon?" in unwrapped(capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = 2.5", "epochs is a whole number, got 2.5"),
        ('preset = "cifar10"', "'preset' is no setting; pass it as a flag"),
        ('arch = "x"', "'arch' is no setting; pass it as a flag"),
        ("force = true", "'force' is no setting"),
        ("dry_run = true", "'dry_run' is no setting"),
        ("[purify]\nepochs = 2", "setting 'purify' is unknown"),
        ("epoch = 2", "setting 'epoch' is unknown; did you mean 'epochs'?"),
        ("epochs 2", "c.toml: "),
    ],
)
def test_a_config_holds_settings_and_nothing_else(text, message, inputs, tmp_path, capsys):
    (tmp_path / "c.toml").write_text(text)
    assert main([*inputs, "--config", str(tmp_path / "c.toml")]) == 2
    assert message in unwrapped(capsys)


def test_what_the_system_refuses_is_an_error_and_no_traceback(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert main(["evaluate", "a" * 5000, "--arch", "x", "--data", "y", "--attack", "badnets"]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 2
    assert "File name too long" in said


def test_an_error_that_quotes_a_name_steers_no_terminal(capsys):
    assert main(["bench", "status", "a\x1b]0;x\x07.toml"]) == 2
    assert "a?]0;x?.toml" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--config", "~/x.toml"], ["--config=~/x.toml"]])
def test_a_home_that_the_shell_has_left_is_written_out(
    words, inputs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([*inputs, *words]) == 2
    assert f"{tmp_path / 'x.toml'}: no such file" in unwrapped(capsys)


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_continue(inputs, tmp_path):
    words = [*inputs, *FEW]
    endless = [*COMMAND, *words, "--epochs", "1000"]
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a child would inherit that it is ignored
    with subprocess.Popen(endless, stderr=subprocess.PIPE, text=True) as process:
        state = tmp_path / "clean.state.safetensors"
        while not state.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
    assert process.returncode == 130
    assert "run the same command with --resume, and without --force, to continue" in said
    assert "Traceback" not in said
    assert not (tmp_path / "clean.safetensors").exists()
    assert state.exists()


def test_a_hostile_checkpoint_is_one_message_and_exit_code_2(inputs, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'boom')!r}, 'w')",)

    torch.save({"state_dict": Bomb()}, tmp_path / "victim.pt")
    assert main([*inputs, *QUICK]) == 2
    assert "not loaded" in capsys.readouterr().err
    assert not (tmp_path / "boom").exists()


def test_what_processes_cannot_share_is_refused_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["attack", "badnets"]) == 2
    assert capsys.readouterr().err == (
        "rank 1: error: only purify can be run by torchrun; start this without it, or unset "
        "WORLD_SIZE\n"
    )
    monkeypatch.delenv("RANK")  # a cluster's own variables are not all that torchrun sets
    assert main(["attack", "badnets"]) == 2
    assert capsys.readouterr().err.startswith("rank ?: error: only purify")


def test_what_the_terminal_cannot_show_is_escaped(tmp_path, monkeypatch):
    grid = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le.toml"))
    grid.write_text((ROOT / "grids/smoke.toml").read_text())
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["bench", "status", str(grid), "--results", str(tmp_path / "none")]) == 0
    assert b"mod\\udce8le: 0 done" in terminal.buffer.getvalue()


def test_codes_of_pictures_in_a_path_are_left_as_they_are(capsys):
    with display("x") as shown:
        shown.say("net.py:brain: 64 features [bold]")
    assert capsys.readouterr().out == "net.py:brain: 64 features [bold]\n"


@pytest.mark.slow
def test_output_that_nobody_reads_ends_the_run_without_a_traceback():
    reads, writes = os.pipe()
    os.close(reads)
    words = ["bench", "status", "grids/smoke.toml"]
    with os.fdopen(writes, "w") as nobody:
        done = subprocess.run(
            [*COMMAND, *words], cwd=ROOT, stdout=nobody, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"")
