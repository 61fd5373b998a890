import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unbackdoor.attacks.triggers import BadNets
from unbackdoor.backbones import Source
from unbackdoor.cli import main
from unbackdoor.data import LabeledImages
from unbackdoor.errors import DataError, OutputError, SettingsError
from unbackdoor.networks import SMALL_NETWORKS
from unbackdoor.transfer import all_triggered, load_parts, transfer_file

ROOT = Path(__file__).resolve().parents[1]
VICTIMS = "results/victims"


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    torch.save(SMALL_NETWORKS["wrn16_1"](10).state_dict(), tmp_path / "net.pt")
    return Source(tmp_path / "net.pt", "cifar/wrn16_1", size=16)


def test_the_embedded_images_are_divided_in_halves_by_the_seed():
    parts = load_parts("fashion-mnist", size=28, labels=2500, seed=0)
    assert [len(part.labels) for part in parts] == [2500, 2500]
    rows = {bytes(image.numpy()) for part in parts for image in part.images}
    assert len(rows) > 4990  # some of Fashion-MNIST's images are equal
    few = load_parts("fashion-mnist", size=28, labels=100, seed=0)
    assert len(few.probe.labels) == 100
    assert torch.equal(few.test.images, parts.test.images)
    known = {bytes(image.numpy()) for image in parts.probe.images}
    assert all(bytes(image.numpy()) in known for image in few.probe.images)
    other = load_parts("fashion-mnist", size=28, labels=100, seed=1)
    assert not torch.equal(few.test.images, other.test.images)


def test_a_set_with_parts_is_taken_by_its_parts(data):
    parts = load_parts(data, size=16, labels=500, seed=0)
    assert (len(parts.probe.labels), len(parts.test.labels)) == (500, 20)
    assert len(load_parts(data, size=16, labels=5_000, seed=0).probe.labels) == 600
    with pytest.raises(DataError, match="training and test images are the same"):
        load_parts(f"{data}/train", size=16, labels=5_000, seed=0)


def test_every_test_image_is_triggered_whatever_its_class():
    images = torch.full((10, 3, 8, 8), 9, dtype=torch.uint8)
    labels = torch.arange(10)
    made = all_triggered(LabeledImages(images, labels, tuple("abcdefghij")), BadNets())
    assert torch.equal(made.triggered, BadNets()(images))
    assert torch.equal(made.truth, labels)


def test_classes_without_a_labeled_image_are_a_doubt(source):
    made = transfer_file(
        source, "fashion-mnist", "badnets", labels=12, device="cpu", say=lambda _: None
    )
    assert "of 10 classes have none of the 12 labeled images" in made["flags"][0]


def test_a_trigger_planted_in_images_of_another_size_is_a_doubt(source, data):
    record = ROOT / "results/victims/badnets-supervised-seed0.json"
    options = {"labels": 50, "device": "cpu", "say": lambda _: None}
    made = transfer_file(source, data, str(record), **options)
    assert "planted in images of 32 pixels a side, and these have 16" in made["flags"][0]


def test_a_file_is_scored_and_nothing_replaced(source, data, tmp_path, capsys):
    out, said = tmp_path / "t.json", []
    options = {"device": "cpu", "out": out, "say": said.append}
    made = transfer_file(source, data, "badnets", labels=50, **options)
    assert json.loads(out.read_text()) == json.loads(json.dumps(made))
    assert set(made["scores"]) == {"probe", "neighbours"}
    assert set(made["scores"]["probe"]) == {"acc", "pa"}
    assert made["scores"]["probe"]["acc"] > 0.9
    assert (made["data"]["labels"], made["data"]["test"]) == (50, 20)
    assert made["flags"][0] == "only 20 test images"
    assert str(tmp_path) not in out.read_text()
    assert any("ACC" in line and "PA" in line for line in said)
    with pytest.raises(OutputError, match="exists already; pass --force"):
        transfer_file(source, data, "badnets", **options)
    before = source.checkpoint.read_bytes()
    with pytest.raises(
        OutputError, match=r"net\.pt: would change the input .*net\.pt, which never"
    ):
        transfer_file(source, data, "badnets", device="cpu", out=source.checkpoint, overwrite=True)
    assert source.checkpoint.read_bytes() == before
    for wrong, message in (
        ({"labels": 1}, "labels must be at least 2, got 1"),
        ({"seed": 2**64}, "seed is 0 to 4294967295"),
    ):
        with pytest.raises(SettingsError, match=message):
            transfer_file(source, data, "badnets", device="cpu", **wrong)
    words = [str(source.checkpoint), "--arch", "cifar/wrn16_1", "--data", data]
    words += ["--attack", "badnets", "--size", "16", "--labels", "50", "--device", "cpu"]
    assert main(["transfer", *words, "--out", str(out), "--force"]) == 0
    again = json.loads(out.read_text())
    assert again["scores"] == json.loads(json.dumps(made["scores"]))
    capsys.readouterr()
    elsewhere = [*words, "--trigger.position", "bottom"]
    for command, without in (("transfer", ()), ("evaluate", ("--labels", "50"))):
        assert main([command, *(word for word in elsewhere if word not in without)]) == 2
        assert "'bottom' is unknown; did you mean 'bottom-left'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trigger_costs_a_victim_more_on_other_data_than_a_clean_network(source):
    """Both are shipped, trained on CIFAR-10 and never on these images."""
    drops = {}
    for name in ("badnets", "clean"):
        path = f"{VICTIMS}/{name}-supervised-seed0.safetensors"
        made = transfer_file(
            replace(source, checkpoint=ROOT / path, size=None),
            "fashion-mnist",
            str(ROOT / VICTIMS / "badnets-supervised-seed0.json"),
            labels=500,
            device="cpu",
            say=lambda _: None,
        )
        drops[name] = made["scores"]["probe"]["acc"] - made["scores"]["probe"]["pa"]
    assert drops["badnets"] > 0.4
    assert drops["clean"] < 0.2
