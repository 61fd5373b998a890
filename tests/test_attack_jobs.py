import json
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from unbackdoor import resume
from unbackdoor.attack_jobs import (
    attack_options,
    make_victim,
    name_files,
    plan_files,
    show_attacks,
)
from unbackdoor.backbones import build, load_backbone
from unbackdoor.checkpoint import sha256_of
from unbackdoor.cli import main
from unbackdoor.data import draw_rows
from unbackdoor.errors import (
    ArchitectureError,
    CheckpointError,
    DataError,
    DivergedError,
    MismatchError,
    OutputError,
    SettingsError,
    UnbackdoorError,
)
from unbackdoor.evaluation import find_attack
from unbackdoor.settings import VictimSettings, victim_preset

STATE = "badnets-supervised-seed0.state.safetensors"
QUICK = VictimSettings(epochs=2, batch_size=25, augment="none")


@pytest.fixture
def make(data, tmp_path):
    """Make a small victim in ``out``; returns its record and the lines that were said."""

    def run(name, settings=QUICK, *, source=data, **options):
        lines = []
        given = {"options": {"target": 1}, "size": 8, **options}
        files = make_victim(
            name,
            str(source),
            "cifar/wrn16_1",
            tmp_path / "out",
            settings,
            device="cpu",
            say=lines.append,
            **given,
        )
        return files, json.loads(files.record.read_text()), "\n".join(lines)

    return run


def weights(files):
    return load_backbone(files.tensors, "cifar/wrn16_1", size=8).state_dict()


def test_a_victim_is_written_with_a_record_that_says_all(make, tmp_path):
    files, record, said = make("badnets")
    assert files.tensors.name == "badnets-supervised-seed0.safetensors"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "badnets-supervised-seed0.json",
        "badnets-supervised-seed0.safetensors",
    ]
    assert record["sha256"] == sha256_of(files.tensors)
    assert record["attack"]["target"] == 1
    assert record["training"]["kind"] == "supervised"
    assert record["training"]["epochs"] == 2
    poisoned = record["poisoned"]
    assert (poisoned["images"], poisoned["share_of_data"]) == (36, 0.06)
    assert poisoned["share_of_target_class"] == 36 / 336
    rows = [int(row) for row in poisoned["rows"].split()]
    assert len(rows) == 36
    assert max(rows) < 300  # the first three hundred are of the other class
    assert "36 of 600 images are poisoned (6.00%), 10.71% of those labeled as class 1" in said
    assert len(record["history"]) == 2
    assert "Scores under badnets, percent" in said
    assert any("three seeds" in flag for flag in record["flags"])
    assert set(record["scores"]) >= {"head", "probe", "neighbours"}
    assert find_attack(str(files.record), size=8).attack.target == 1


def test_a_clean_victim_is_scored_under_every_attack_and_doubted_too(make):
    _, record, said = make("clean", replace(QUICK, warmup=2))
    assert record["attack"] is None
    assert "nothing is poisoned" in said
    assert set(record["scores"]) == {"badnets", "blend", "sig", "wanet"}
    assert record["flags"][-1] == "one victim, one split: a table needs three seeds"
    assert "only 10 triggered images" in record["flags"]
    assert "20 test images, 10 of them triggered as well" in said
    assert "the learning rate only rises: 2 epochs of warm-up, 2 in all" in said


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_below_one_is_refused(size, data, tmp_path):
    with pytest.raises(SettingsError, match=f"size .*got {size}"):
        make_victim("badnets", data, "cifar/wrn16_1", tmp_path, QUICK, size=size)
    with pytest.raises(SettingsError, match=f"size .*got {size}"):
        show_attacks(data, tmp_path / "a.html", size=size)


def test_a_simclr_victim_has_no_head_and_poisons_the_target_class(make):
    settings = replace(QUICK, augment="views", batch_size=40)
    files, record, said = make("badnets", settings, training="simclr")
    assert files.tensors.name == "badnets-simclr-seed0.safetensors"
    assert record["scores"]["head"] is None
    assert "180 of 600 images are poisoned (30.00%), 60.00% of those labeled as class 1" in said
    assert record["attack"]["trigger"]["position"] == "center"
    assert not any("fc" in key for key in weights(files))


@pytest.fixture
def start(tmp_path):
    """A network to train on from."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = build("cifar/wrn16_1", classes=2).network.state_dict()
    state["fc.bias"] += 0.25  # what a new head begins with is 0
    save_file(state, tmp_path / "start.safetensors")
    return tmp_path / "start.safetensors"


@pytest.mark.parametrize("training", ["supervised", "simclr"])
def test_a_victim_may_be_trained_on_from_a_checkpoint(training, make, start):
    still = replace(QUICK, epochs=1, augment="views", batch_size=40, learning_rate=1e-12)
    files, record, _ = make("badnets", still, training=training, start=start)
    assert record["start"] == sha256_of(start)
    begun, ended = load_file(start), load_file(files.tensors)
    for name in ended:
        if name.startswith("fc"):
            assert not ended[name].allclose(begun[name])
        elif "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(ended[name], begun[name], rtol=0, atol=1e-6)
    assert any(name.startswith("fc") for name in ended) == (training == "supervised")


def test_a_training_resumes_only_from_where_it_started(make, start, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_STATES", 0.0)

    def stop(step, steps):
        if step == 30:  # in the second epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("badnets", start=start, on_step=stop)
    with pytest.raises(OutputError, match="start was"):
        make("badnets", resume=True)


def test_a_start_of_another_architecture_is_refused_before_anything_is_written(make, tmp_path):
    torch.save({"conv1.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "other.pt")
    with pytest.raises(MismatchError):
        make("badnets", start=tmp_path / "other.pt")
    assert not (tmp_path / "out").exists()


def test_what_a_victim_is_trained_on_from_is_never_replaced(make, start, tmp_path):
    (tmp_path / "out").mkdir()
    own = start.rename(tmp_path / "out/badnets-supervised-seed0.safetensors")
    before = own.read_bytes()
    for given in ("start", "surrogate"):
        with pytest.raises(OutputError, match="would change the input"):
            make("badnets", overwrite=True, **{given: own})
    assert own.read_bytes() == before


def test_wanet_is_redrawn_in_every_batch(make):
    _, record, said = make("wanet")
    assert record["poisoned"] == {
        "share_of_data": 0.06,
        "share_of_target_class": 36 / 336,
        "redrawn": True,
    }
    assert "anew, 10.71% of those labeled as the target, and 12.00% in noise mode" in said


@pytest.mark.slow
def test_clas_surrogate_is_trained_on_from_where_it_is(make, start, tmp_path):
    make("cla", start=start)
    surrogate = json.loads((tmp_path / "out/clean-supervised-seed0.json").read_text())
    assert surrogate["start"] == sha256_of(start)


@pytest.mark.slow
def test_cla_makes_its_surrogate_once_and_then_finds_it(make, tmp_path):
    _, record, said = make("cla")
    assert "training a clean surrogate first" in said
    surrogate = tmp_path / "out/clean-supervised-seed0.safetensors"
    assert record["surrogate"] == sha256_of(surrogate)
    assert record["attack"]["pgd"] == {"norm": "linf", "epsilon": 16 / 255, "steps": 7}
    made = surrogate.stat().st_mtime_ns
    _, again, said = make("cla", overwrite=True)
    assert f"the surrogate is {surrogate}" in said
    assert again["surrogate"] == record["surrogate"]
    assert surrogate.stat().st_mtime_ns == made
    given = surrogate.rename(tmp_path / "given.safetensors")
    surrogate.with_suffix(".json").unlink()
    _, again, said = make("cla", overwrite=True, surrogate=given)
    assert again["surrogate"] == record["surrogate"]
    assert not surrogate.exists()


def test_a_clean_network_of_another_kind_is_no_surrogate(make, tmp_path):
    _, made, _ = make("clean", replace(QUICK, augment="shift"))
    path = tmp_path / "out/clean-supervised-seed0.json"
    for changed, named in (
        ({"training": {"epochs": 9}}, "training"),
        ({"arch": "other"}, "arch"),
        ({"attack": {"name": "sig"}}, "attack"),
        ({"data": {"sha256": "0"}}, "data"),
        ({"sha256": "0"}, "tensors"),
        ({"start": "0"}, "start"),
        ({"size": 9, "mean": []}, "mean, size"),
    ):
        path.write_text(json.dumps(made | changed))
        with pytest.raises(OutputError, match=f"no surrogate for this victim, for {named} differ"):
            make("cla")


@pytest.mark.slow
def test_cla_resumes_in_its_surrogate_and_in_itself(make, monkeypatch, tmp_path):
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_STATES", 0.0)

    def stop(step, steps):
        if step == 30:  # in the second epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("cla", on_step=stop)
    assert (tmp_path / "out/clean-supervised-seed0.state.safetensors").exists()
    with pytest.raises(OutputError, match="pass --resume"):
        make("cla")
    surrogate = tmp_path / "out/clean-supervised-seed0.json"

    def stop_later(step, steps):
        if step == 30 and surrogate.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("cla", resume=True, on_step=stop_later)
    state = tmp_path / "out/cla-supervised-seed0.state.safetensors"
    kept = state.read_bytes()
    files, _, said = make("cla", resume=True)
    assert said.count("resuming after epoch 1 of 2") == 1
    ended = weights(files)
    for path in (files.tensors, files.record):
        path.unlink()
    _, _, said = make("cla", resume=True)  # as when killed before its first state
    assert "no epoch with this surrogate was kept" in said
    torch.testing.assert_close(weights(files), ended, rtol=0, atol=0)
    for path in (files.tensors, files.record):
        path.unlink()
    state.write_bytes(kept)
    other = make("clean", replace(QUICK, seed=1))[0].tensors
    with pytest.raises(OutputError, match="belongs to another run: surrogate was"):
        make("cla", resume=True, surrogate=other)


@pytest.mark.slow
def test_force_starts_an_interrupted_surrogate_again(make, monkeypatch, tmp_path):
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_STATES", 0.0)

    def stop(step, steps):
        if step == 30:
            raise KeyboardInterrupt

    with pytest.raises(OutputError, match=r"clean-.* there is nothing to resume"):
        make("cla", resume=True)
    with pytest.raises(KeyboardInterrupt):
        make("cla", on_step=stop)
    _, _, said = make("cla", overwrite=True)
    assert "resuming" not in said
    assert [path.suffix for path in (tmp_path / "out").iterdir()].count(".json") == 2


class ThreeClasses(nn.Module):
    """Says of three classes whatever the data have, and breaks once it was trained."""

    mean, std, size = (0.5,) * 3, (0.5,) * 3, 8

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, images):
        self.batches += self.training
        broken = torch.nan if self.batches > 0 and not self.training else 0.0
        return self.head(self.conv(images).mean((2, 3)) + broken)


def three_classes():
    return ThreeClasses()


def of_another_width(classes):
    network = ThreeClasses()
    network.head = nn.Linear(5, classes)
    return network


def two_classes(classes):
    network = ThreeClasses()
    network.head = nn.Linear(4, classes)
    return network


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (f"{__file__}:three_classes", "tells 3 classes apart, the data have 2"),
        (f"{__file__}:of_another_width", "with head fails on 8-pixel RGB images: RuntimeError"),
        ("vit_tiny_patch16_224", "fails on 8-pixel RGB images"),
    ],
)
def test_a_network_that_cannot_take_the_data_is_refused_before_the_training(
    arch, message, data, tmp_path
):
    with pytest.raises(ArchitectureError, match=message):
        make_victim("clean", data, arch, tmp_path / "out", QUICK, options={"target": 1}, size=8)
    assert not (tmp_path / "out").exists()


def test_a_victim_that_cannot_be_scored_keeps_its_training(data, tmp_path):
    def run(**options):
        return make_victim(
            "clean",
            data,
            f"{__file__}:two_classes",
            tmp_path,
            QUICK,
            options={"target": 1},
            say=lines.append,
            **options,
        )

    lines = []
    unscored = "cannot be scored: the backbone yields NaN or infinite features.* start again"
    with pytest.raises(DivergedError, match=unscored):
        run()
    assert (tmp_path / "clean-supervised-seed0.state.safetensors").exists()
    with pytest.raises(DivergedError, match=unscored):
        run(resume=True)
    assert sum("epoch 2/2" in line for line in lines) == 1  # it was not trained again


def test_a_folder_that_may_not_be_written_to_is_refused(data, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may do everything
    with pytest.raises(OutputError, match="may not be written to"):
        make_victim("clean", data, "cifar/wrn16_1", tmp_path / "out", QUICK)


def test_a_surrogate_for_nobody_or_of_other_classes_is_refused(make, tmp_path):
    with pytest.raises(SettingsError, match="badnets needs no --surrogate"):
        make("badnets", surrogate=tmp_path / "none.pt")
    other = build("cifar/wrn16_1", classes=3).network.state_dict()
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(MismatchError, match="a surrogate has a head for 2 classes"):
        make("cla", surrogate=tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"none\.pt"):
        make("cla", surrogate=tmp_path / "none.pt")


def test_a_killed_training_resumes_to_the_same_bits(make, monkeypatch, tmp_path):
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_STATES", 0.0)
    settings = replace(QUICK, epochs=3)
    whole = weights(make("badnets", settings)[0])
    for path in (tmp_path / "out").iterdir():
        path.unlink()

    def stop(step, steps):
        if step == 1:
            time.sleep(5)
        if step == 60:  # of 72: in the third epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("badnets", settings, on_step=stop)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [STATE]
    with pytest.raises(OutputError, match="pass --resume to its command"):
        make("badnets", settings)
    with pytest.raises(OutputError, match="belongs to another run: epochs was 3, now 2"):
        make("badnets", QUICK, resume=True)
    files, _, said = make("badnets", settings, resume=True)
    assert "resuming after epoch 2 of 3" in said
    torch.testing.assert_close(weights(files), whole, rtol=0, atol=0)
    made = json.loads(files.record.read_text())
    assert made["seconds"] > sum(seconds for _, seconds in made["history"]) >= 5  # of both runs
    assert not files.state.exists()
    with pytest.raises(OutputError, match="exists already"):
        make("badnets", settings, resume=True)


def test_a_victim_without_its_record_is_not_finished(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "badnets-supervised-seed0.safetensors").touch()
    with pytest.raises(OutputError, match="exists already"):
        make("badnets")
    with pytest.raises(OutputError, match="there is nothing to resume"):
        make("badnets", resume=True)  # not refused for the tensors that are there


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("badnet", {}, SettingsError, "did you mean 'badnets'?"),
        ("clean", {"options": {}}, DataError, "target class 6 is out of range: 0 to 1"),
        ("badnets", {"options": {"target": 2}}, DataError, "target class 2 is out of range: 0"),
        ("badnets", {"trigger": {"size": "9"}}, DataError, "patch is 9 pixels wide"),
        ("badnets", {"options": {"target": 1, "share": 0.6}}, DataError, "to 0.5$"),
        ("clean", {"trigger": {"size": "3"}}, SettingsError, "a clean victim has no trigger"),
        ("badnets", {"settings": replace(QUICK, limit=601)}, DataError, "has 600 images"),
        ("badnets", {"settings": replace(QUICK, batch_size=999)}, DataError, "do not fill one"),
    ],
)
def test_what_cannot_be_made_is_refused_and_nothing_is_written(
    name, options, error, message, make, tmp_path
):
    with pytest.raises(error, match=message):
        make(name, **options)
    assert not (tmp_path / "out").exists()


def test_data_without_labels_or_of_one_class_are_refused(own_data, tmp_path):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat/0.png")
    for source, message in (
        ("flat", "lies in no class folder"),
        ("one", "training images are of one class"),
    ):
        if source == "one":
            for split in ("train", "test"):
                (tmp_path / "one" / split).mkdir(parents=True)
                source_of_one = own_data / split / "dark"
                source_of_one.rename(tmp_path / "one" / split / "dark")
        with pytest.raises(UnbackdoorError, match=message):
            make_victim(
                "badnets",
                str(tmp_path / source),
                "cifar/wrn16_1",
                tmp_path / "out",
                QUICK,
                options={"target": 0},
                size=8,
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("left", [0, 3])
def test_what_cannot_be_scored_is_refused_before_the_training(left, make, own_data, tmp_path):
    for path in sorted((own_data / "test").rglob("*.png"))[left:]:
        path.unlink()
    for path in sorted((own_data / "train/bright").glob("*.png"))[left:]:
        path.unlink()
    steps = []
    with pytest.raises(DataError):
        make("badnets", source=own_data, on_step=lambda *step: steps.append(step))
    assert not steps
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["badnets", "clean"])
def test_test_images_of_the_target_alone_are_refused_before_the_training(
    name, make, own_data, tmp_path
):
    for path in (own_data / "test/bright").glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="every test image is of the target class 1"):
        make(name, source=own_data)
    assert not (tmp_path / "out").exists()


def test_images_too_small_for_a_patch_are_refused_for_a_clean_victim_too(make, tmp_path):
    with pytest.raises(DataError, match="patch is 3 pixels wide, the images are 2"):
        make("clean", size=2)
    assert not (tmp_path / "out").exists()


def test_rows_of_a_part_are_numbered_as_in_the_whole(make):
    _, record, _ = make("badnets", replace(QUICK, limit=100))
    rows = [int(row) for row in record["poisoned"]["rows"].split()]
    drawn = draw_rows(600, 100, seed=0).tolist()
    assert len(rows) == 6
    assert set(rows) <= {row for row in drawn if row < 300}


def test_a_network_without_a_head_needs_simclr(data, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "    net.mean, net.std, net.size = (0.5,) * 3, (0.2,) * 3, 8\n"
        "    return net\n"
    )
    arch = f"{tmp_path / 'net.py'}:build"
    options = {"options": {"target": 1}, "device": "cpu", "say": lambda _: None}
    with pytest.raises(SettingsError, match="has no head that is known"):
        make_victim("badnets", data, arch, tmp_path / "out", QUICK, **options)
    settings = replace(QUICK, augment="views")
    files = make_victim(
        "badnets", data, arch, tmp_path / "out", settings, training="simclr", **options
    )
    assert json.loads(files.record.read_text())["arch"] == "net.py:build"
    with pytest.raises(ArchitectureError, match="'cifar/wrn16' is unknown"):
        make_victim("badnets", data, "cifar/wrn16", tmp_path / "out2", QUICK, **options)


def test_options_go_under_their_names_in_the_attack():
    nothing = {"target": None, "share": None, "share_of_target": None, "noise": None}
    assert attack_options(**nothing, all_to_all=False) == {}
    assert attack_options(**{**nothing, "share": 0.1}, all_to_all=True) == {
        "share": 0.1,
        "share_of": "data",
        "goal": "all-to-all",
    }
    assert attack_options(**{**nothing, "share_of_target": 0.5}, all_to_all=False) == {
        "share": 0.5,
        "share_of": "target",
        "poisons": "target",
        "redrawn": False,
    }
    with pytest.raises(SettingsError, match="not both"):
        attack_options(**{**nothing, "share": 0.1, "share_of_target": 0.5}, all_to_all=False)


def test_a_folder_that_is_a_file_and_contradicting_flags_are_refused(data, tmp_path):
    (tmp_path / "out").touch()
    below = tmp_path / "out/victims"
    with pytest.raises(OutputError, match="cannot be made: Not a directory"):
        make_victim("clean", data, "cifar/wrn16_1", below, QUICK, size=8, options={"target": 1})
    options = {"overwrite": False, "resume": False}
    with pytest.raises(OutputError, match="is a file; --out takes a folder"):
        plan_files("badnets", tmp_path / "out", "supervised", QUICK, **options)
    with pytest.raises(SettingsError, match="pass one of them"):
        plan_files("badnets", tmp_path, "supervised", QUICK, overwrite=True, resume=True)


def test_what_was_started_again_by_force_can_be_gone_on_with(tmp_path):
    files = name_files("badnets", tmp_path, "supervised", QUICK)
    plan = partial(plan_files, "badnets", tmp_path, "supervised", QUICK)
    files.record.touch()
    with pytest.raises(OutputError, match="exists already; pass --force"):
        plan(overwrite=False, resume=True)
    files.state.touch()  # by a later run with --force
    assert plan(overwrite=False, resume=True) == files
    with pytest.raises(OutputError, match="exists already; pass --force"):
        plan(overwrite=False, resume=False)


def test_the_picture_shows_every_trigger(data, tmp_path):
    page = show_attacks(data, tmp_path / "a.html", size=32).read_text()
    for name in ("badnets", "blend", "sig", "wanet", "badnets, SimCLR"):
        assert f"<h2>{name}</h2>" in page or f">{name}<" in page
    with pytest.raises(OutputError, match="exists already"):
        show_attacks(data, tmp_path / "a.html", size=32)


def test_a_trigger_is_drawn_on_the_images_of_an_architecture_labeled_or_not(tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(2):
        Image.new("RGB", (80, 80), (40 * i, 90, 90)).save(tmp_path / f"flat/{i}.png")
    options = {"arch": "test_resnet", "name": "badnets"}
    page = show_attacks(str(tmp_path / "flat"), tmp_path / "a.html", **options).read_text()
    assert "BadNets(size=32, cell=4" in page  # test_resnet takes 160 pixels
    page = show_attacks(str(tmp_path / "flat"), tmp_path / "b.html", size=32, **options).read_text()
    assert "BadNets(size=3, cell=1" in page


def test_one_trigger_is_drawn_with_its_options(data, tmp_path):
    options = {"size": 32, "name": "badnets", "training": "simclr", "trigger": {"size": "5"}}
    page = show_attacks(data, tmp_path / "a.html", **options).read_text()
    assert "BadNets(size=5, cell=1, position=&#x27;center&#x27;)" in page
    assert "wanet" not in page
    for wrong, message in (({"name": "nosuch"}, "'nosuch' is unknown"), ({"name": None}, "name")):
        with pytest.raises(SettingsError, match=message):
            show_attacks(data, tmp_path / "b.html", **{**options, **wrong})
    assert not (tmp_path / "b.html").exists()


def test_presets_follow_the_paper():
    paper = victim_preset("paper", training="supervised", attack="badnets")
    assert VictimSettings(**paper).epochs == 200
    assert victim_preset("paper", training="supervised", attack="cla")["augment"] == "none"
    epochs = [
        victim_preset("cpu", training=kind, attack="wanet")["epochs"]
        for kind in ("supervised", "simclr")
    ]
    assert epochs[0] == 60
    assert epochs[1] == victim_preset("cpu", training="simclr", attack="sig")["epochs"]
    simclr = victim_preset("paper", training="simclr", attack="badnets")
    assert (simclr["epochs"], simclr["views"]["blur"]) == (1000, 0.5)
    blend = victim_preset("paper", training="simclr", attack="blend")
    assert blend["views"] == {**simclr["views"], "blur": 0.0}
    imagenet = [
        victim_preset("imagenet100", training=kind, attack="sig")["epochs"]
        for kind in ("supervised", "simclr")
    ]
    assert imagenet == [90, 400]
    with pytest.raises(SettingsError, match="'fast' is unknown; there are paper, cpu, imagenet100"):
        victim_preset("fast", training="simclr", attack="sig")


@pytest.mark.slow
@pytest.mark.parametrize("simclr", [[], ["--simclr"]])
def test_the_imagenet_presets_run_at_224_pixels(simclr, data, tmp_path):
    words = f"attack badnets --data {data} --arch resnet18 --out {tmp_path}/out --target 1"
    few = "--preset imagenet100 --epochs 1 --batch-size 4 --limit 12 --device cpu"
    assert main([*words.split(), *few.split(), *simclr]) == 0
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json"))
    assert record["size"] == 224
    assert record["attack"]["trigger"]["size"] == 32
    assert record["training"]["augment"] == "views"
    assert record["training"]["optimizer"] == ("lars" if simclr else "sgd")
