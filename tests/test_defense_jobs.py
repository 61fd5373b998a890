import io
import json
import random
import re
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import safetensors
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from unbackdoor import defense_jobs
from unbackdoor.backbones import Backbone, Source, build
from unbackdoor.cli import main
from unbackdoor.data import load_labeled, split_rows
from unbackdoor.defense_jobs import Chosen, defend_file, find_defense, load_pool, run_defense
from unbackdoor.defenses import keeping
from unbackdoor.defenses.common import Defended, DefenseData
from unbackdoor.errors import (
    ArchitectureError,
    DataError,
    DivergedError,
    OutputError,
    SettingsError,
    UnlabeledError,
)
from unbackdoor.networks import SMALL_NETWORKS
from unbackdoor.roles import defender_rows, divide_rows
from unbackdoor.settings import ChangeSettings, PurifySettings


class Killed(BaseException):
    """Stands for a signal."""


OWN = """
import copy
import torch
from dataclasses import dataclass
from pathlib import Path
from unbackdoor.defenses.common import Defended

@dataclass(frozen=True)
class Settings:
    factor: float = 0.5
    seed: int = 0

def shrink(backbone, data, settings: Settings, *, device="cpu", on_step=None):
    repaired = copy.deepcopy(backbone)
    with torch.no_grad():
        repaired.body.conv1.weight.mul_(settings.factor)
    return Defended(repaired, {"seed": settings.seed, "labels": data.labels is not None})

def returns_nothing(backbone, data, settings, *, device="cpu", on_step=None):
    pass

def works_in_place(backbone, data, settings: Settings, *, device="cpu", on_step=None):
    with torch.no_grad():
        backbone.body.conv1.weight.mul_(settings.factor)
    backbone.mean.zero_()
    data.images.zero_()
    backbone.body.fc.register_forward_hook(lambda *_: 0 * _[2])
    return Defended(backbone.train(), {"labels": data.labels.zero_().tolist()})

def returns_another(backbone, data, settings, *, device="cpu", on_step=None):
    backbone.body.conv1 = torch.nn.Conv2d(3, 8, 3)
    return Defended(backbone, {})

def logs_nothing(backbone, data, settings, *, device="cpu", on_step=None):
    return Defended(copy.deepcopy(backbone), None)

def logs_itself(backbone, data, settings, *, device="cpu", on_step=None):
    log = {}
    log["log"] = log
    return Defended(copy.deepcopy(backbone), log)

@dataclass(frozen=True)
class Bare:
    factor: float

def wants_a_setting(backbone, data, settings: Bare, *, device="cpu", on_step=None):
    pass

@dataclass(frozen=True)
class Placed:
    place: Path = Path("x")

def takes_a_path(backbone, data, settings: Placed, *, device="cpu", on_step=None):
    pass

def names_no_type(backbone, data, settings: "Nowhere", *, device="cpu", on_step=None):
    pass
"""


@dataclass(frozen=True)
class Odd:
    """Settings of somebody's own, of kinds that ours are not of."""

    maybe: float | None = None
    pair: tuple[int, float] = (1, 2.0)
    either: int | str = 1
    mode: Literal[1, 2] = 1
    modes: tuple[Literal["a", "b"], ...] = ("a",)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """200 images in two folders, one for each class; all tests read the same."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for i in range(200):
        folder = root / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:03}.png")
    return str(root)


@pytest.fixture
def victim(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build("cifar/wrn16_1", classes=2).network
    path = tmp_path / "victim.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


@pytest.fixture(autouse=True)
def measured_in_one_step(monkeypatch):
    one = partial(PurifySettings, changes=ChangeSettings(steps=1))
    monkeypatch.setattr(defense_jobs, "PurifySettings", one)  # most of the time otherwise


def run(name, victim, photos, out, **options):
    source = Source(victim, "cifar/wrn16_1", size=16)
    return defend_file(name, source, photos, out, device="cpu", say=lambda _: None, **options)


def test_the_three_files_are_those_of_purify_and_tell_what_was_done(victim, photos, tmp_path):
    out = tmp_path / "clean.safetensors"
    outputs = run("fine-tuning", victim, photos, out, values=["tuning.epochs=2"], share=0.1)
    old, new = load_file(victim), load_file(out)
    assert list(old) == list(new)
    assert not old["conv1.weight"].equal(new["conv1.weight"])
    assert not old["fc.weight"].equal(new["fc.weight"])
    record = json.loads(outputs.record.read_text())
    assert record["defense"] == "fine-tuning"
    assert record["labels"] == {"kind": "given", "pseudo_label_accuracy": None}
    assert record["head_tuned"] is True
    assert record["settings"]["tuning"]["epochs"] == 2
    assert record["images"]["count"] == record["log"]["images"] == 20
    assert record["evidence"]["after"]["cosine"] < 1
    with safetensors.safe_open(out, framework="pt") as file:
        provenance = json.loads(file.metadata()["unbackdoor"])
    assert provenance["defense"] == "fine-tuning"
    assert provenance["input"] == record["input"]
    page = outputs.report.read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "Defended by fine-tuning" in page
    assert "pseudo-labels" not in page
    assert str(tmp_path) not in outputs.record.read_text() + page
    assert not outputs.state.exists()


def test_pseudo_labels_are_scored_where_the_truth_is_known(victim, photos, tmp_path):
    outputs = run("nad", victim, photos, tmp_path / "clean.pt", labels="pseudo", share=0.1)
    labels = json.loads(outputs.record.read_text())["labels"]
    assert labels["kind"] == "pseudo"
    assert 0.2 < labels["pseudo_label_accuracy"] < 0.8  # an untrained network guesses
    page = outputs.report.read_text()
    assert re.search(
        rf"pseudo-labels that are right.*{labels['pseudo_label_accuracy']:.1%}", page, re.DOTALL
    )


def test_masks_are_whole_in_the_record_and_cut_short_in_the_report(victim, photos, tmp_path):
    options = ["iterations=1", "batch_size=4"]
    outputs = run("anp", victim, photos, tmp_path / "clean.pt", labels="given", values=options)
    masks = json.loads(outputs.record.read_text())["log"]["masks"]
    assert sum(map(len, masks.values())) == 464
    page = outputs.report.read_text()
    assert "(the JSON has all of it)" in page
    assert str(masks["bn1"]) not in page


def test_a_label_free_defense_takes_a_folder_without_classes(victim, photos, tmp_path):
    flat = Path(photos) / "class0"
    outputs = run("clp", victim, str(flat), tmp_path / "clean.pt", labels="pseudo", share=0.5)
    record = json.loads(outputs.record.read_text())
    assert record["labels"] == {"kind": "pseudo", "pseudo_label_accuracy": None}
    assert record["head_tuned"] is False
    with pytest.raises(DataError):
        run("nad", victim, str(flat), tmp_path / "other.pt", labels="given", share=0.5)


@pytest.mark.parametrize(
    ("labels", "share", "count"),
    [("given", 0.5, 100), ("none", 0.05, 10), ("none", 0.9, 180), ("pseudo", 0.05, 10)],
)
def test_no_image_of_the_probe_is_given_to_a_defense(photos, labels, share, count):
    pool = load_pool(photos, size=16, labels=labels, share=share, seed=3)
    everything = load_labeled(photos, split="train", size=16)
    rows = split_rows(200, unlabeled=10, probe=2, seed=3)
    probe = {image.numpy().tobytes() for image in everything.images[rows.probe]}
    unlabeled = {image.numpy().tobytes() for image in everything.images[rows.unlabeled]}
    taken = {image.numpy().tobytes() for image in pool.images}
    assert len(taken) == count
    assert not taken & probe
    kept = divide_rows(200, seed=3).validation
    assert len(kept) == 10
    assert not taken & {image.numpy().tobytes() for image in everything.images[kept]}
    if labels == "given":
        assert not taken & unlabeled
    else:
        assert unlabeled <= taken
    where = {image.numpy().tobytes(): i for i, image in enumerate(everything.images)}
    order = [where[image.numpy().tobytes()] for image in pool.images]
    assert pool.truth is None if labels == "none" else pool.truth.equal(everything.labels[order])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.95, 1.5])
def test_a_share_that_cannot_be_is_refused(photos, share):
    with pytest.raises(DataError, match=f"share.* {share:g}|share {share:g} of 200 images is"):
        load_pool(photos, size=16, labels="given", share=share, seed=0)


def test_what_somebody_elses_code_draws_is_the_same_and_what_it_sets_is_undone(photos):
    def careless(backbone, data, settings, *, device="cpu", on_step=None):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        drawn = [torch.rand(1).item(), random.gauss(0, 1), float(np.random.rand())]  # noqa: NPY002
        return Defended(backbone, {"drawn": drawn})

    network = SMALL_NETWORKS["wrn16_1"](10)
    backbone = Backbone(network, (), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    data = DefenseData(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    def drawn(seed):
        chosen = Chosen("careless", careless, None, False, seed)
        return run_defense(chosen, backbone, data, device=torch.device("cpu")).log["drawn"]

    first = drawn(0)
    assert drawn(0) == first
    assert not set(drawn(1)) & set(first)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]


def test_a_broken_image_does_not_make_a_labeled_set_unlabeled(photos, tmp_path):
    broken = shutil.copytree(photos, tmp_path / "broken")
    (broken / "class0" / "000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="1 of its images are broken"):
        load_pool(str(broken), size=16, labels="pseudo", share=0.5, seed=0)


def test_a_broken_image_without_a_label_is_replaced_and_named(victim, photos, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in Path(photos).rglob("*.png"):
        shutil.copy(path, flat)
    sound = load_pool(str(flat), size=16, labels="none", share=0.05, seed=0)
    row = defender_rows(200, labeled=False, share=0.05, seed=0)[3]
    (flat / f"{row:03}.png").write_bytes(b"no image")
    pool = load_pool(str(flat), size=16, labels="none", share=0.05, seed=0)
    assert (pool.images != sound.images).flatten(1).any(1).nonzero().flatten().tolist() == [3]
    out, lines = tmp_path / "x.safetensors", []
    source = Source(victim, "cifar/wrn16_1", size=16)
    options = {"labels": "none", "share": 0.05, "values": ["tuning.epochs=1"], "device": "cpu"}
    outputs = defend_file("bcu", source, str(flat), out, say=lines.append, **options)
    assert f"1 broken images were replaced: {row:03}.png" in lines
    record = json.loads(outputs.record.read_text())
    assert record["images"]["broken"] == [f"{row:03}.png"]


def test_test_images_are_given_to_no_defense_even_without_labels(tmp_path):
    kind = pa.struct([("bytes", pa.binary())])
    for name, grey in (("train-0", 50), ("test-0", 200)):
        Image.new("RGB", (16, 16), (grey,) * 3).save(file := io.BytesIO(), "PNG")
        column = pa.array([{"bytes": file.getvalue()}] * 40, kind)
        parquet.write_table(pa.table([column], ["image"]), tmp_path / f"{name}.parquet")
    pool = load_pool(str(tmp_path), size=16, labels="none", share=0.5, seed=0)
    assert pool.truth is None
    assert pool.images.unique().tolist() == [50]
    assert len(pool.images) == 20
    with pytest.raises(UnlabeledError, match="no label column"):
        load_pool(str(tmp_path), size=16, labels="given", share=0.5, seed=0)


def test_a_defense_of_ones_own_is_run_like_ours(victim, photos, own, tmp_path):
    outputs = run(
        f"{own}:shrink",
        victim,
        photos,
        tmp_path / "clean.safetensors",
        values=["factor=1/4"],
        seed=7,
        share=0.1,
    )
    old, new = load_file(victim), load_file(outputs.tensors)
    torch.testing.assert_close(new["conv1.weight"], old["conv1.weight"] / 4)
    record = json.loads(outputs.record.read_text())
    assert record["defense"] == "mine.py:shrink"
    assert record["log"] == {"seed": 7, "labels": False}
    assert record["settings"] == {"factor": 0.25, "seed": 7}


def test_of_a_defense_of_ones_own_only_the_tensors_count(victim, photos, own, tmp_path):
    files = {}
    for name in ("shrink", "works_in_place"):  # one on a copy, one on all that it was given
        out = tmp_path / f"{name}.safetensors"
        outputs = run(f"{own}:{name}", victim, photos, out, share=0.1, labels="pseudo")
        files[name] = load_file(out), json.loads(outputs.record.read_text())
    (clean, record), (other, other_record) = files.values()
    assert all(value.equal(other[key]) for key, value in clean.items())
    for part in ("evidence", "images", "labels"):
        assert record[part] == other_record[part]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_cannot_be_is_refused(seed, own):
    for name in ("bcu", "clp", f"{own}:shrink"):
        with pytest.raises(SettingsError, match=f"seed is 0 to 4294967295, .* got {seed}"):
            find_defense(name, seed=seed)
    for values, given in (([f"seed={seed}"], 0), (["seed=3"], seed)):
        with pytest.raises(SettingsError, match=f"got {seed}"):
            find_defense("bcu", values, seed=given)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("returns_nothing", "returned a NoneType; a defense returns Defended"),
        ("returns_another", "must return the backbone with tensors of the same shapes"),
        ("logs_nothing", "its log must be a dict, got a NoneType"),
        ("logs_itself", "its log must be what JSON can hold: Circular"),
        ("wants_a_setting", "the setting 'factor' has no default; give it one"),
        ("takes_a_path", "its settings must be what JSON can hold: .*Path"),
        ("names_no_type", "its annotations cannot be read: name 'Nowhere' is not defined"),
    ],
)
def test_what_a_defense_of_ones_own_may_not_return(name, message, victim, photos, own, tmp_path):
    with pytest.raises(SettingsError, match=message):
        run(f"{own}:{name}", victim, photos, tmp_path / "clean.pt", share=0.1)
    assert not list(tmp_path.glob("clean*"))


def test_infinite_weights_are_never_written(victim, photos, own, tmp_path):
    with pytest.raises(DivergedError, match=r"NaN or infinite values in conv1\.weight"):
        run(
            f"{own}:shrink",
            victim,
            photos,
            tmp_path / "clean.pt",
            values=["factor=inf"],
            share=0.1,
        )
    assert not list(tmp_path.glob("clean*"))


@pytest.mark.parametrize(
    ("name", "values", "error", "message"),
    [
        ("fine-tunin", [], SettingsError, "did you mean 'fine-tuning'"),
        ("zzz", [], SettingsError, "there are fine-tuning, .*, and path/to/file.py:function"),
        ("none.py:f", [], ArchitectureError, "no such file; NAME takes path/to/file.py:function"),
        (
            "nad",
            ["bete=1"],
            SettingsError,
            "--set 'bete' is unknown; did you mean 'beta'",
        ),
        ("nad", ["tuning.epoch=1"], SettingsError, "did you mean 'tuning.epochs'"),
        ("nad", ["beta"], SettingsError, "--set takes name=value, got 'beta'"),
        ("nad", ["tuning.epochs=2.5"], SettingsError, "tuning.epochs is a whole number, got '2.5'"),
        ("bcu", ["match=labels"], SettingsError, "match 'labels' is unknown; there are feat"),
        ("nad", ["tuning.epochs=0"], SettingsError, "tuning.epochs must be at least 1, got 0"),
        ("nad", ["tuning.batch_size=1"], SettingsError, "tuning.batch_size must be at least 2"),
        ("ibau", ["batch_size=1"], SettingsError, "batch_size must be at least 2, got 1"),
    ],
)
def test_an_unknown_defense_or_setting_is_one_message(name, values, error, message):
    with pytest.raises(error, match=message):
        find_defense(name, values)


def test_the_seed_is_the_defenses_too_unless_it_is_set():
    assert find_defense("nad", seed=5).settings.seed == 5
    assert find_defense("nad", ["seed=2"], seed=5).settings.seed == 2


def test_the_command_line_runs_a_defense_of_ones_own(victim, photos, own, tmp_path, capsys):
    out = tmp_path / "clean.safetensors"
    words = ["defend", f"{own}:shrink", str(victim), "--arch", "cifar/wrn16_1", "--size", "16"]
    words += ["--data", photos, "--device", "cpu", "--out", str(out), "--share", "1/10"]
    assert main([*words, "--labels", "pseudo", "--set", "factor=1/4"]) == 0
    assert re.search(r"pseudo-labels are right for \d+\.\d% of them", capsys.readouterr().out)
    torch.testing.assert_close(
        load_file(out)["conv1.weight"], load_file(victim)["conv1.weight"] / 4
    )
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["log"] == {"seed": 0, "labels": True}
    assert main([*words, "--force", "--set", "facto=1"]) == 2
    assert "--set 'facto' is unknown; did you mean 'factor'" in capsys.readouterr().err
    words[1] = f"{own}:shrin"
    assert main([*words, "--force"]) == 2
    assert "mine.py has no function 'shrin'" in capsys.readouterr().err


def test_the_command_line_runs_a_defense_and_says_what_is_wrong(victim, photos, tmp_path, capsys):
    words = ["defend", "bcu", str(victim), "--arch", "cifar/wrn16_1", "--size", "16"]
    words += ["--data", photos, "--device", "cpu", "--out", str(tmp_path / "clean.safetensors")]
    words += ["--share", "1/10", "--set", "tuning.epochs=1", "--set", "match=logits"]
    assert main(words) == 0
    assert "20 images, labels: none" in capsys.readouterr().out
    for suffix in ("safetensors", "json", "html"):
        assert (tmp_path / f"clean.{suffix}").exists()
    assert main(words) == 2
    assert "exists already; pass --force" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0
    capsys.readouterr()
    plain = words[: words.index("--set")]
    assert main([*plain[:1], "nad", *plain[2:], "--force", "--labels", "none"]) == 2
    assert "nad needs labels; pass --labels given or --labels pseudo" in capsys.readouterr().err


def test_a_killed_defense_is_resumed_to_the_same_file(victim, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "SECONDS", 0.0)
    source = Source(victim, "cifar/wrn16_1", size=16)
    options = {"values": ["tuning.epochs=3", "teacher.epochs=2"], "share": 0.1}
    options |= {"device": "cpu", "say": lambda line: None}
    whole = defend_file("nad", source, photos, tmp_path / "whole.safetensors", **options)
    out, steps = tmp_path / "out.safetensors", []

    def kill(step, of):
        if step == of - 1:
            raise Killed

    with pytest.raises(OutputError, match="there is nothing to resume"):
        defend_file("nad", source, photos, out, resume=True, **options)
    with pytest.raises(Killed):
        defend_file("nad", source, photos, out, on_step=kill, **options)
    assert not out.exists()
    with pytest.raises(OutputError, match="an interrupted run can go on from here"):
        defend_file("nad", source, photos, out, **options)
    with pytest.raises(OutputError, match="belongs to another run: images was"):
        defend_file("nad", source, photos, out, resume=True, **options | {"share": 0.2})
    with pytest.raises(SettingsError, match="pass one of them"):
        defend_file("nad", source, photos, out, resume=True, overwrite=True, **options)
    count = lambda step, of: steps.append((step, of))  # noqa: E731
    outputs = defend_file("nad", source, photos, out, resume=True, on_step=count, **options)
    assert 0 < len(steps) < steps[0][1]
    assert not outputs.state.exists()
    torch.testing.assert_close(load_file(out), load_file(whole.tensors), rtol=0, atol=0)
    logs = [json.loads(path.record.read_text())["log"] for path in (whole, outputs)]
    assert logs[0] == logs[1]


GOES_ON = """
from unbackdoor.defenses.fine_tuning import fine_tune
from unbackdoor.defenses.settings import FineTuningSettings

def own(backbone, data, settings: FineTuningSettings, *, device="cpu", on_step=None, keep=None):
    return fine_tune(backbone, data, settings, device=device, on_step=on_step, keep=keep)
"""


def test_a_defense_that_was_edited_or_told_other_labels_does_not_go_on(
    victim, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(keeping, "SECONDS", 0.0)
    own, out = tmp_path / "own.py", tmp_path / "out.safetensors"
    own.write_text(GOES_ON)
    source = Source(victim, "cifar/wrn16_1", size=16)
    options = {"labels": "given", "values": ["tuning.epochs=2"], "share": 0.1, "device": "cpu"}
    options |= {"say": lambda line: None}
    run = partial(defend_file, f"{own}:own", source, photos, out, **options)

    def kill(step, of):
        if step == of:
            raise Killed

    with pytest.raises(Killed):
        run(on_step=kill)
    own.write_text(GOES_ON + "# with a correction")
    with pytest.raises(OutputError, match="belongs to another run: defense_code was"):
        run(resume=True)
    own.write_text(GOES_ON)
    label = defense_jobs.label
    monkeypatch.setattr(
        defense_jobs,
        "label",
        lambda *told: replace(given := label(*told), labels=1 - given.labels),
    )
    with pytest.raises(OutputError, match="belongs to another run: labels was"):
        run(resume=True)
    monkeypatch.setattr(defense_jobs, "label", label)
    assert run(resume=True).record.is_file()


def test_what_an_interrupted_defense_kept_is_dropped_by_force(
    victim, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(keeping, "SECONDS", 0.0)
    source, out, steps = Source(victim, "cifar/wrn16_1", size=16), tmp_path / "out.safetensors", []
    options = {"labels": "pseudo", "values": ["tuning.epochs=2"], "say": lambda line: None}

    def kill(step, of):
        if step == of:
            raise Killed

    with pytest.raises(Killed):
        defend_file("fine-tuning", source, photos, out, on_step=kill, **options)
    count = lambda step, of: steps.append((step, of))  # noqa: E731
    defend_file("fine-tuning", source, photos, out, overwrite=True, on_step=count, **options)
    assert len(steps) == steps[0][1]
