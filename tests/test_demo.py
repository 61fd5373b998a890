import importlib.resources
import json
import re
from dataclasses import replace

import pytest
import torch

from unbackdoor import demo
from unbackdoor.backbones import Source, open_backbone
from unbackdoor.cbd import purify
from unbackdoor.cli import app
from unbackdoor.data import LabeledImages, load_images
from unbackdoor.demo import SETTINGS, UNLABELED, command_line, run_demo, split_images
from unbackdoor.errors import OutputError
from unbackdoor.evaluation import Split, find_attack
from unbackdoor.metrics import make_test_set, score


def test_no_image_has_two_roles_and_the_unlabeled_ones_are_what_purify_draws():
    splits = split_images(3)
    parts = [splits.unlabeled, splits.probe.images, splits.test.images]
    assert [len(part) for part in parts] == [2500, 500, 2000]
    rows = {bytes(image.numpy()) for part in parts for image in part}
    embedded = load_images("fashion-mnist")
    distinct = {bytes(image.numpy()) for image in embedded.read(range(len(embedded)))}
    assert rows == distinct
    drawn = load_images("fashion-mnist", limit=UNLABELED, seed=3)
    assert torch.equal(drawn.read(range(UNLABELED)), splits.unlabeled)
    assert not torch.equal(splits.unlabeled, split_images(4).unlabeled)


@pytest.mark.slow
def test_the_demo_removes_the_backdoor_durably(tmp_path, request):
    folder = request.config.getoption("--demo")
    if folder is None:
        folder = tmp_path
        run_demo(folder, say=lambda _: None)
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    victim, fine_tuned, purified = (scores[of] for of in ("victim", "fine_tuned", "purified"))
    assert victim["head"]["asr"] >= 0.95
    assert fine_tuned["head"]["asr"] > 0.5
    for reading in ("head", "probe", "reestimated", "fine_tuned"):
        assert purified[reading]["asr"] <= 0.10
    for reading in ("head", "probe"):
        assert purified[reading]["acc"] >= victim[reading]["acc"] - 0.04


@pytest.mark.slow
def test_the_same_repair_without_the_pull_term_keeps_the_backdoor():
    assets, splits = importlib.resources.files("unbackdoor") / "assets", split_images(0)
    made = json.loads((assets / "demo_victim.json").read_text())
    images, labels, _ = splits.test
    attack = find_attack(str(assets / "demo_victim.json"), size=images.shape[-1]).attack
    test = make_test_set(images, labels, attack, classes=10)
    with importlib.resources.as_file(assets / "demo_victim.safetensors") as checkpoint:
        assert made["size"] == images.shape[-1]
        pixels = (tuple(made["mean"]), tuple(made["std"]), made["size"])
        victim = open_backbone(Source(checkpoint, made["arch"], *pixels)).backbone
    control = replace(SETTINGS, pull=0.0, distill=SETTINGS.pull + SETTINGS.distill)
    repaired = purify(victim, splits.unlabeled, control).backbone
    assert score(repaired, {"head": repaired.heads[0]}, test)["head"].asr >= 0.90


def test_the_printed_command_is_the_repair_that_the_demo_runs(tmp_path):
    source = Source(tmp_path / "v.safetensors", "cifar/wrn16_1", (0.2,) * 3, (0.3,) * 3, size=28)
    words = command_line(source, SETTINGS, tmp_path).split()
    assert words[0] == "unbackdoor"
    _, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
    given = bound.arguments
    assert given["settings"] == SETTINGS
    assert given["network"].of(given["checkpoint"]) == source
    assert (given["images"], given["limit"], given["device"]) == ("fashion-mnist", 2500, "cpu")


@pytest.mark.slow
def test_the_demo_prints_scores_and_writes_one_self_contained_page(tmp_path, monkeypatch):
    def few_images(seed):  # a minute otherwise
        unlabeled, probe, test, *_ = split_images(seed)
        probe, test = (
            LabeledImages(some.images[:count], some.labels[:count], some.classes)
            for some, count in ((probe, 90), (test, 300))
        )
        return Split(unlabeled[:300], probe, test)

    monkeypatch.setattr(demo, "split_images", few_images)
    monkeypatch.setattr(demo, "UNLABELED", 300)
    lines = []
    quick = replace(SETTINGS, epochs=1, changes=replace(SETTINGS.changes, steps=1))
    result = run_demo(tmp_path, settings=quick, say=lines.append)
    assert result.victim.head.asr >= 0.95
    text = "\n".join(lines)
    for word in ("probe ASR", "head ASR", "victim", "fine-tuned with 90 labels", "Does it last?"):
        assert word in text
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 2_000_000
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for title in ("The attack", "Losses", "Features of test images"):
        assert title in page
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["purified"]["probe"]["asr"] == result.purified.probe.asr


@pytest.mark.parametrize("name", ["report.html", "scores.json", "clean.safetensors"])
def test_files_that_are_there_are_not_overwritten(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(OutputError, match="exists already; pass --force"):
        run_demo(tmp_path)
