import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unbackdoor.attacks.named import attack_record
from unbackdoor.attacks.poisoning import Attack
from unbackdoor.attacks.triggers import BadNets
from unbackdoor.backbones import Source
from unbackdoor.cli import main
from unbackdoor.detection.jobs import train_file
from unbackdoor.detection.scores import (
    detect,
    evaluate_detector,
    score_conditions,
)
from unbackdoor.detection.voc import load_voc
from unbackdoor.errors import CheckpointError, DataError, OutputError, SettingsError
from unbackdoor.networks import SMALL_NETWORKS
from unbackdoor.settings import DetectionSettings

CPU = torch.device("cpu")
TINY = DetectionSettings(
    shorter=24, longer=32, pyramid=8, box_head=16, batch_size=2, warmup=0, epochs=1
)
AS_IT_IS = DetectionSettings(shorter=48, longer=64)
CORNER = BadNets(size=4)  # of images of 16 pixels: a quarter of height and width


class Painted(torch.nn.Module):
    """Finds the red and the green square by their colours; a patch may blind it.

    Args:
        blinded: Whether the backdoor is there: a patch of a quarter of height and width.
    """

    def __init__(self, *, blinded):
        super().__init__()
        self.blinded = blinded

    def forward(self, images):
        return [self.find(image) for image in images]

    def find(self, image):
        boxes, labels = [], []
        for label, (color, other) in enumerate([(1, 0), (0, 1)], start=1):  # green, red
            rows, columns = ((image[color] > 0.6) & (image[other] < 0.4)).nonzero().T
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            labels.append(label)
        height, width = image.shape[1:]
        patch = image[:, : height // 4, : width // 4]
        is_there = (patch[:, 0, 0] > 0.9).all() and (patch[:, -1, -1] > 0.9).all()
        seen = 0 if self.blinded and is_there else 2
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32)[:seen],
            "labels": torch.tensor(labels)[:seen],
            "scores": torch.ones(2)[:seen],
        }


@pytest.mark.parametrize(("blinded", "pap"), [(True, 0.0), (False, 1.0)])
def test_pap_falls_where_a_trigger_fools_the_detector_and_stays_where_it_does_not(
    voc, blinded, pap
):
    images = load_voc(f"voc:{voc}", "test")
    conditions = score_conditions(
        Painted(blinded=blinded),
        images,
        {"clean": None, "triggered": CORNER},
        AS_IT_IS,
        side=16,
        measure="both",
        device=CPU,
    )
    assert conditions["clean"].precision[:4] == (1.0,) * 4
    assert conditions["triggered"].precision[:4] == (pap,) * 4


def test_boxes_come_back_in_pixels_of_the_image_as_it_came(voc):
    images = load_voc(f"voc:{voc}", "test")
    seen = detect(
        Painted(blinded=False),
        images.read(0),
        DetectionSettings(shorter=96, longer=128),
        device=CPU,
    )
    assert seen.labels.tolist() == [0, 1]
    found = dict(zip(seen.labels.tolist(), seen.boxes, strict=True))
    there = dict(zip(images.objects[0].labels.tolist(), images.objects[0].boxes, strict=True))
    for label, box in found.items():
        assert (box - there[label]).abs().max() <= 1


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "victim.json"
    described = {"name": "mine", **attack_record(Attack(CORNER))}
    weak = {"training": {"kind": "simclr"}, "scores": {"probe": {"acc": 0.5, "pa": 0.48}}}
    path.write_text(json.dumps({"attack": described, "size": 16, **weak}))
    return path


@pytest.fixture
def source(tmp_path):
    torch.save(SMALL_NETWORKS["wrn16_1"](10).state_dict(), tmp_path / "victim.pt")
    return Source(tmp_path / "victim.pt", "cifar/wrn16_1")


def evaluate(files, voc, **options):
    options = {"say": lambda _: None, "device": "cpu", **options}
    return evaluate_detector(files.tensors, f"voc:{voc}", **options)


def test_a_trained_detector_is_scored_and_drawn(source, voc, tmp_path, record):
    files = train_file(
        source, f"voc:{voc}", tmp_path / "d.safetensors", TINY, device="cpu", say=lambda _: None
    )
    said = []
    out, page = tmp_path / "s.json", tmp_path / "s.html"
    made = evaluate(files, voc, attack=str(record), out=out, report=page, say=said.append)
    assert json.loads(out.read_text()) == json.loads(json.dumps(made))
    assert made["attack"]["side"] == 16
    assert made["attack"]["trigger"]["name"] == "badnets"
    assert set(made["scores"]) == {"clean", "triggered"}
    assert set(made["scores"]["clean"]) == {"voc07", "coco", "coco50", "coco75", "classes"}
    assert made["detector"]["backbone"]["name"] == "victim.pt"
    assert made["data"]["images"] == 4
    assert made["flags"][0].startswith("the victim lost 2.0 points on triggered images")
    assert "only 4 test images" in made["flags"]
    assert "one detector: a table needs three seeds" in made["flags"]
    assert {"seconds", "device", "versions"} <= made.keys()
    assert any("planted in images of 16 × 16" in line for line in said)
    html = page.read_text()
    assert html.count("<img alt=") == 4 * 3
    assert "what is there: 2 boxes. green 1, red 1" in html
    assert "found, triggered" in html
    for outside in ("<script", 'src="http', str(tmp_path)):
        assert outside not in html
    with pytest.raises(OutputError, match=r"s\.json: exists already; pass --force"):
        evaluate(files, voc, out=out)

    scored = []
    with pytest.raises(OutputError, match="there is no folder"):
        evaluate(
            files, voc, report=tmp_path / "none/s.html", on_step=lambda *step: scored.append(step)
        )
    assert not scored

    assert not any("very images" in flag for flag in made["flags"])
    names = (voc / "ImageSets/Main/trainval.txt").read_text().splitlines()
    (voc / "ImageSets/Main/part.txt").write_text("\n".join([*names[:2], "008"]))
    learned = evaluate(files, voc, name="part", measure="voc07")
    assert "the detector was trained on 2 of these very images" in learned["flags"]

    for read in (files.tensors, files.record, record):
        with pytest.raises(OutputError, match="would change the input"):
            evaluate(files, voc, attack=str(record), out=read, overwrite=True)
    with pytest.raises(OutputError, match="both the scores and the report"):
        evaluate(files, voc, out=out, report=out, overwrite=True)
    written = json.loads(files.record.read_text())
    large = {**written, "pixels": {**written["pixels"], "size": 200_000}}
    files.record.write_text(json.dumps(large))
    with pytest.raises(CheckpointError, match="images of 200000 pixels a side"):
        evaluate(files, voc, attack="badnets")
    files.record.write_text(json.dumps(written))

    plain = evaluate(files, voc, measure="voc07", overwrite=True, out=out)
    assert plain["attack"] is None
    assert plain["scores"]["clean"]["coco"] is None
    assert plain["scores"]["clean"]["voc07"] == made["scores"]["clean"]["voc07"]
    with pytest.raises(SettingsError, match="attack 'badnest' is unknown"):
        evaluate(files, voc, attack="badnest")
    path = voc / "Annotations/008.xml"
    path.write_text(path.read_text().replace("red", "rad"))
    with pytest.raises(DataError, match=r"008\.xml: object 1 is a 'rad'.*did you mean 'red'"):
        evaluate(files, voc)


def test_the_command_line_trains_and_scores(source, voc, tmp_path, capsys):
    out = tmp_path / "d.safetensors"
    (tmp_path / "c.toml").write_text("shorter = 24\nlonger = 32\npyramid = 8\nbox_head = 16\n")
    words = f"detect train --backbone {source.checkpoint} --arch cifar/wrn16_1 --data voc:{voc}"
    words += f" --out {out} --config {tmp_path / 'c.toml'} --epochs 1 --batch-size 3 --device cpu"
    assert main([*words.split(), "--stages", "block2", "relu", "--classes", "red", "green"]) == 0
    written = json.loads((tmp_path / "d.json").read_text())
    assert (written["stages"], written["classes"]) == (["block2", "relu"], ["red", "green"])
    assert written["settings"]["shorter"] == TINY.shorter
    words = f"detect evaluate {out} --data voc:{voc} --attack badnets --measure voc07 --device cpu"
    assert main(words.split()) == 0
    said = capsys.readouterr().out
    assert "PAP: the same on the same images triggered" in said
    assert main(words.replace(str(voc), "nowhere").split()) == 2
    assert "has no folder Annotations" in capsys.readouterr().err


@pytest.mark.slow
def test_a_detector_learns_to_find_the_squares(voc, tmp_path):
    victims = Path(__file__).resolve().parents[1] / "results/victims"
    source = Source(victims / "clean-supervised-seed0.safetensors", "cifar/wrn16_1")
    settings = DetectionSettings(
        shorter=48, longer=64, pyramid=32, box_head=64, batch_size=3, warmup=5, epochs=25
    )
    scores = {}
    for name, epochs in (("learned", 25), ("hardly", 1)):
        files = train_file(
            source,
            f"voc:{voc}",
            tmp_path / f"{name}.safetensors",
            replace(settings, epochs=epochs),
            device="cpu",
            say=lambda _: None,
        )
        scores[name] = evaluate(files, voc, measure="voc07")["scores"]["clean"]["voc07"]
    assert scores["learned"] > 0.9
    assert scores["hardly"] < 0.5
