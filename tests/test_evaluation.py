import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from unbackdoor.attacks.named import attack_record, named_attack
from unbackdoor.attacks.triggers import BadNets
from unbackdoor.backbones import Source, open_backbone
from unbackdoor.checkpoint import sha256_of
from unbackdoor.data import LabeledImages, draw_rows, load_labeled
from unbackdoor.errors import CheckpointError, DataError, OutputError, SettingsError
from unbackdoor.evaluation import (
    LOST,
    TOOK,
    Known,
    broken_by_tuning,
    divide,
    doubts,
    evaluate_file,
    find_attack,
    known_from,
    like_victim,
    load_split,
    not_taken,
    own_head,
    unread_head,
)
from unbackdoor.metrics import Reading, Scores, make_test_set, score
from unbackdoor.networks import SMALL_NETWORKS
from unbackdoor.probe import extract, linear_probe

ATTACK = named_attack("badnets", size=32, training="supervised", options={"target": 1})


@pytest.fixture
def source(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(SMALL_NETWORKS["wrn16_1"](2).state_dict(), tmp_path / "v.pt")
    return Source(tmp_path / "v.pt", "cifar/wrn16_1", size=16)


def test_an_evaluation_prints_what_it_measures_and_writes_the_same(data, source, tmp_path):
    lines = []
    out = tmp_path / "scores.json"
    record = evaluate_file(
        source, data, "badnets", target=1, durable=True, device="cpu", out=out, say=lines.append
    )
    assert json.loads(out.read_text()) == record
    assert record["data"] == {"source": "data", "unlabeled": 30, "probe": 6, "test": 20}
    scores = record["scores"]
    later = ["reestimated", "fine_tuned", "head_reestimated", "head_fine_tuned"]
    assert list(scores) == ["head", "probe", "neighbours", *later]
    assert all((read["images"], read["triggered"]) == (20, 10) for read in scores.values())
    text = "\n".join(lines)
    for words in (
        "own head",
        "20 test images, 10 of them triggered",
        "to class 1",
        "ASR: triggered ones",
    ):
        assert words in text
    with pytest.raises(OutputError, match="exists already; pass --force"):
        evaluate_file(source, data, "badnets", out=out)
    lines.clear()
    with pytest.raises(OutputError, match="there is no folder"):
        evaluate_file(source, data, "badnets", out=tmp_path / "none/scores.json", say=lines.append)
    with pytest.raises(SettingsError, match=r"seed is 0 to 4294967295, .* got -1"):
        evaluate_file(source, data, "badnets", seed=-1, say=lines.append)
    assert not lines
    again = evaluate_file(source, data, "badnets", target=1, device="cpu", say=lambda _: None)
    assert again["scores"]["probe"] == scores["probe"]
    assert again["scores"]["fine_tuned"] is None


def test_scores_never_replace_the_checkpoint_or_the_victims_record(source, data, tmp_path):
    record = tmp_path / "victim.json"
    record.write_text(json.dumps({"attack": {"name": "badnets", **attack_record(ATTACK)}}))
    for path in (source.checkpoint, record):
        before = path.read_bytes()
        with pytest.raises(OutputError, match="would change the input"):
            evaluate_file(source, data, str(record), out=path, overwrite=True)
        assert path.read_bytes() == before


def test_a_split_has_no_row_twice():
    """Each image says its row number."""
    count = 1000
    images = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(count) % 256, torch.arange(count) // 256
    train = LabeledImages(images, torch.arange(count) % 2, ("a", "b"))
    split = divide(train, LabeledImages(images[:5], train.labels[:5], train.classes), seed=0)
    parts = [split.unlabeled, split.probe.images, split.validation.images]
    rows = [int(image[0, 0, 0]) + 256 * int(image[0, 0, 1]) for part in parts for image in part]
    assert [len(part) for part in parts] == [50, 10, 50]
    assert len(set(rows)) == 110
    drawn = draw_rows(count, 50, seed=0).tolist()
    assert rows[:50] == drawn  # what `purify --limit 50 --seed 0` takes


def test_training_images_are_no_test_images(data):
    with pytest.raises(DataError, match="training and test images are the same"):
        load_split(f"{data}/train", size=16, seed=0)


def test_a_split_follows_its_seed(data):
    split = load_split(data, size=16, seed=0)
    assert (len(split.unlabeled), len(split.probe.labels), len(split.test.labels)) == (30, 6, 20)
    assert torch.equal(split.unlabeled, load_split(data, size=16, seed=0).unlabeled)
    assert not torch.equal(split.unlabeled, load_split(data, size=16, seed=1).unlabeled)


def test_too_few_images_for_a_probe_are_refused(own_data):
    for path in sorted((own_data / "train").rglob("*.png"))[3:-2]:
        path.unlink()
    with pytest.raises(DataError, match="1 % of 5 training images are too few for a probe"):
        load_split(str(own_data), size=16, seed=0)


def write_record(tmp_path, **changed):
    record = {
        "attack": {"name": "mine", **attack_record(ATTACK)},
        "training": {"kind": "supervised"},
        "scores": {"head": {"acc": 0.75, "asr": 0.5}},
        **changed,
    }
    path = tmp_path / "victim.json"
    path.write_text(json.dumps(record))
    return str(path)


def test_an_attack_is_found_by_its_victims_record_or_by_name(tmp_path):
    found = find_attack(write_record(tmp_path), size=32)
    assert found == Known(ATTACK, "mine", True, 0.5, None, 0.75)
    simclr = write_record(tmp_path, training={"kind": "simclr"}, scores={"head": None})
    assert find_attack(simclr, size=32) == Known(ATTACK, "mine", False)
    scores = {"probe": {"acc": 0.75, "pa": 0.5}}
    assert find_attack(write_record(tmp_path, scores=scores), size=32).victim_loss == 0.25
    assert find_attack("badnets", size=32, target=1) == Known(ATTACK, "badnets", True)
    centred = find_attack("badnets", size=32, training="simclr").attack
    assert centred.trigger.position == "center"
    options = {"position": "bottom-right", "cell": "3"}  # as a command line has them
    elsewhere = find_attack("badnets", size=32, trigger=options).attack
    assert elsewhere == replace(ATTACK, target=6, trigger=BadNets(3, 3, "bottom-right"))


def test_the_name_of_an_attack_in_a_record_steers_no_terminal(tmp_path):
    described = {**attack_record(ATTACK), "name": "x\x1b[2J"}
    assert find_attack(write_record(tmp_path, attack=described), size=32).name == "x?[2J"


def test_a_file_that_holds_no_attack_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no attack .* pass an attack's name: badnets"):
        find_attack(write_record(tmp_path, attack=None), size=32)
    for text in ("[", "[]", "[" * 100_000):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(CheckpointError, match="is no victim's record"):
            find_attack(str(tmp_path / "x.json"), size=32)
    odd = write_record(tmp_path, training=[], scores=[1])
    assert find_attack(odd, size=32) == Known(ATTACK, "mine", True)
    for size, side in ((16, 16), ("16", None), (10**9, None)):
        assert find_attack(write_record(tmp_path, size=size), size=32).side == side
    with pytest.raises(SettingsError, match="attack 'badnest' is unknown"):
        find_attack("badnest", size=32)
    with pytest.raises(CheckpointError, match=r"none\.json: is no victim's record: .*No such file"):
        find_attack("none.json", size=32)


@pytest.mark.parametrize(
    "given", [{"target": 0}, {"training": "simclr"}, {"trigger": {"size": "4"}}]
)
def test_what_a_record_says_is_not_given_as_well(given, tmp_path):
    with pytest.raises(SettingsError, match="none of it is given as well"):
        find_attack(write_record(tmp_path), size=32, **given)


def test_a_victims_record_says_which_images_its_backbone_takes(source, tmp_path):
    images = {"arch": "cifar/wrn16_1", "size": 28, "mean": [0.1] * 3, "std": [0.2] * 3}
    record = write_record(tmp_path, **images)
    plain = replace(source, size=None)
    like = like_victim(plain, record)
    assert (like.size, like.mean, like.std) == (28, (0.1,) * 3, (0.2,) * 3)
    assert like_victim(source, record).size == 16  # what is given goes first
    assert like_victim(plain, "badnets") == plain
    assert like_victim(plain, write_record(tmp_path, **{**images, "arch": "resnet18"})) == plain
    own = write_record(tmp_path, **{**images, "arch": "net.py:build"})
    assert like_victim(replace(plain, arch="a/net.py:build"), own).size == 28


def test_doubts_are_said():
    many, few = (Reading(None, Scores(1, 1, 1, 10, n), Scores(1, 1, 1, 10, n)) for n in (900, 9))
    probe = LabeledImages(torch.zeros(3, 3, 8, 8).byte(), torch.arange(3), ("a", "b", "c"))
    assert doubts(Known(ATTACK, "x", True, 0.95), many, probe) == doubts(
        Known(ATTACK, "x", False, 0.2, 0.3), many, probe
    )
    unmoved = doubts(Known(ATTACK, "x", False, None, 0.019), many, probe)
    assert unmoved[0].startswith("the victim lost 1.9 points on triggered images, less than 15")
    weak = doubts(Known(ATTACK, "x", True, 0.5), few, probe)
    assert "the victim's own ASR was 50.0 %" in weak[0]
    assert weak[1] == "only 9 triggered images"
    to_all = replace(ATTACK, goal="all-to-all")  # of what is recognized
    assert doubts(Known(to_all, "x", True, 0.73, None, 0.8), many, probe) == doubts(
        Known(ATTACK, "x", True, 0.95, None, 0.8), many, probe
    )
    some = doubts(Known(to_all, "x", True, 0.71, None, 0.8), many, probe)
    assert "the victim's own ASR was 71.0 %, below 72 %" in some[0]
    assert "three seeds" in weak[-1]
    blind = doubts(Known(ATTACK, "x", True, 1.0, None, 0.39), many, probe)
    assert "the victim's own accuracy was 39.0 %, where guessing has 33.3" in blind[0]
    assert len(doubts(Known(ATTACK, "x", True, 1.0, None, 0.41), many, probe)) == len(blind) - 1
    elsewhere = doubts(Known(ATTACK, "x", True, 0.95, side=32), many, probe)
    assert elsewhere[0].startswith("the trigger was planted in images of 32 pixels a side, and the")
    assert len(doubts(Known(ATTACK, "x", True, 0.95, side=8), many, probe)) == len(elsewhere) - 1


def test_a_fine_tuning_that_breaks_the_network_is_doubted():
    def reading(**values):
        return Reading(*(Scores(0.8, 0.9, 0.1, 900, 900),) * 3, **values)

    later, fell = Scores(0.7, 0.1, 0.6, 900, 900), Scores(0.6, 0.1, 0.5, 900, 900)
    assert broken_by_tuning(reading()) == []
    assert (
        broken_by_tuning(reading(reestimated=fell, fine_tuned=later, head_fine_tuned=later)) == []
    )
    probe = "fine-tuned with the probe its accuracy falls from 80.0 to 60.0 %"
    (found,) = broken_by_tuning(reading(reestimated=later, fine_tuned=fell, head_fine_tuned=later))
    assert found.startswith(probe)
    found = broken_by_tuning(reading(reestimated=later, fine_tuned=fell, head_fine_tuned=None))
    assert found[1:] == ["fine-tuned with the own head it ends in NaN: there is no such reading"]
    headless = reading(reestimated=later, fine_tuned=fell)._replace(head=None)
    labeled = LabeledImages(torch.zeros(3, 3, 8, 8).byte(), torch.arange(3), ("a", "b", "c"))
    assert doubts(Known(ATTACK, "x", True, 0.95), headless, labeled)[0].startswith(probe)


def test_classes_without_a_labeled_image_are_doubted():
    """The attacker's own above all: nothing is ever taken for it then, whatever the network."""
    reading = Reading(None, Scores(1, 0, 1, 10, 900), Scores(1, 0, 1, 10, 900))
    images, classes = torch.zeros(3, 3, 8, 8).byte(), ("a", "b", "c")
    known = Known(ATTACK, "x", True, 0.95)

    def said(labels, attack=ATTACK):
        probe = LabeledImages(images, torch.tensor(labels), classes)
        return doubts(known._replace(attack=attack), reading, probe)[0]

    assert said([0, 0, 1]).startswith("1 of 3 classes have none of the 3 labeled images")
    assert "target" not in said([0, 0, 1])
    assert "the target 1 too: their ASR is 0 whatever the network" in said([0, 2, 2])
    assert "target" not in said([0, 2, 2], replace(ATTACK, goal="all-to-all"))


def test_a_head_of_other_classes_is_not_scored(source):
    backbone = open_backbone(source).backbone
    assert isinstance(own_head(backbone, classes=2), nn.Linear)
    assert own_head(backbone, classes=3) is None
    reading = Reading(None, *[Scores(1, 0, 1, 10, 900)] * 2)
    said = ["the own head (fc) is not one linear layer of 3 classes: unread"]
    assert unread_head(backbone, reading, classes=3) == said
    assert unread_head(backbone, reading._replace(head=reading.probe), classes=2) == []


RESULTS = Path(__file__).resolve().parents[1] / "results"
SHIPPED = [*sorted(RESULTS.glob("victims/*.json")), *sorted(RESULTS.glob("development/*.json"))]


@pytest.fixture(scope="module")
def cifar10(shared_data):
    images, labels, classes = load_labeled(f"cifar10:{shared_data / 'cifar10'}", split="test")
    return LabeledImages(images[:1000], labels[:1000], classes)


def test_records_of_victims_doubt_what_is_doubted_now():
    seen = 0
    for path in sorted(RESULTS.glob("*/**/*-seed*.json")):
        record = json.loads(path.read_text())
        if "training" not in record or "flags" not in record:
            continue
        name = (record["attack"] or {"name": "clean"})["name"]
        attack = find_attack("badnets" if name == "clean" else str(path), size=32).attack
        doubts = not_taken(known_from(record, attack, name)) if name != "clean" else []
        assert record["flags"] == [*doubts, "one victim, one split: a table needs three seeds"], (
            path
        )
        seen += 1
    assert seen > len(SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_victim_is_what_its_record_says(path, cifar10):
    record = json.loads(path.read_text())
    tensors = path.with_suffix(".safetensors")
    assert sha256_of(tensors) == record["sha256"]
    loaded = open_backbone(Source(tensors, record["arch"]))
    assert loaded.backbone.mean.flatten().tolist() == pytest.approx(record["mean"])
    clean = record["attack"] is None
    attack = find_attack("badnets" if clean else str(path), size=32).attack
    readings = record["scores"]["badnets"] if clean else record["scores"]
    head, images, labels = own_head(loaded.backbone, classes=10), cifar10.images, cifar10.labels
    if record["training"]["kind"] == "simclr":
        assert head is None
        recorded, within = readings["probe"], 0.1  # of other labels, on fewer images
        assert clean or recorded["acc"] - recorded["pa"] >= LOST
        head = linear_probe(extract(loaded.backbone, images[500:]), labels[500:], classes=10)
        images, labels = images[:500], labels[:500]
    else:
        recorded, within = readings["head"], 0.05  # on a tenth of the images
        assert clean or recorded["asr"] >= TOOK
        assert recorded["acc"] >= 0.8
    test = make_test_set(images, labels, attack, classes=10)
    scores = score(loaded.backbone, {"head": head}, test)["head"]
    for what in ("acc", "asr", "pa"):
        assert getattr(scores, what) == pytest.approx(recorded[what], abs=within)
