import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from conftest import write_voc

from unbackdoor import resume
from unbackdoor.backbones import Source
from unbackdoor.checkpoint import sha256_of
from unbackdoor.detection.jobs import open_detector, plan_files, train_file
from unbackdoor.errors import (
    ArchitectureError,
    CheckpointError,
    DivergedError,
    MismatchError,
    OutputError,
    SettingsError,
)
from unbackdoor.networks import SMALL_NETWORKS
from unbackdoor.outputs import name_trained
from unbackdoor.settings import DetectionSettings

TINY = DetectionSettings(
    shorter=24, longer=32, pyramid=8, box_head=16, batch_size=2, warmup=0, epochs=1
)
PIXELS = {"mean": [0.5] * 3, "std": [0.5] * 3}


def write_victim(folder):
    torch.manual_seed(0)
    torch.save(SMALL_NETWORKS["wrn16_1"](10).state_dict(), folder / "victim.pt")
    return Source(folder / "victim.pt", "cifar/wrn16_1")


@pytest.fixture
def source(tmp_path):
    return write_victim(tmp_path)


def train(source, voc, out, settings=TINY, **options):
    options = {"say": lambda _: None, "device": "cpu", **options}
    return train_file(source, f"voc:{voc}", out, settings, **options)


def train_and_kill(source, voc, out):
    """Kill a training after its second step, whose state is kept."""

    def kill(step, steps):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "SECONDS_BETWEEN_STATES", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train(source, voc, out, on_step=kill)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return train(write_victim(folder), write_voc(folder / "voc"), folder / "d.safetensors")


@pytest.fixture
def trained(made, tmp_path):
    """A copy, which a test may change."""
    for path in made[:2]:
        shutil.copy(path, tmp_path)
    return name_trained(tmp_path / "d.safetensors")


def test_three_steps_write_a_file_and_a_record_that_open_as_the_same_detector(
    source, voc, tmp_path
):
    said, steps = [], []
    before = source.checkpoint.read_bytes()
    out = tmp_path / "d.safetensors"
    files = train(source, voc, out, say=said.append, on_step=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert source.checkpoint.read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("d.*")) == ["d.json", "d.safetensors"]
    assert "6 images, 12 objects of 2 classes (green, red)" in said[0]
    assert any(line.startswith("epoch 1/1  loss ") for line in said)
    record = json.loads(files.record.read_text())
    assert (record["schema"], record["kind"]) == (1, "detector")
    assert record["sha256"] == sha256_of(out)
    came = {"name": "victim.pt", "sha256": sha256_of(source.checkpoint)}
    assert record["backbone"] == {**came, "nesting": [], "prefix": ""}
    assert record["stages"] == ["block1", "block2", "relu"]
    assert record["data"]["set"] == "trainval"
    assert record["settings"]["box_head"] == 16
    assert {"seconds", "device", "versions", "history", "precision"} <= record.keys()
    assert str(tmp_path) not in files.record.read_text()

    opened = open_detector(out)
    assert (opened.classes, opened.settings, opened.size) == (("green", "red"), TINY, 32)
    written = safetensors.torch.load_file(out)
    given = torch.load(source.checkpoint, weights_only=True)
    assert torch.equal(written["backbone.body.conv1.weight"], given["conv1.weight"])
    changed = "block3.layer.0.conv1.weight"
    assert not torch.equal(written[f"backbone.body.{changed}"], given[changed])
    state = opened.detector.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in written.items())
    assert not opened.detector.training


def test_a_killed_run_resumes_to_the_same_file(source, voc, tmp_path, trained):
    out = tmp_path / "killed.safetensors"

    train_and_kill(source, voc, out)
    state = tmp_path / "killed.state.safetensors"
    assert not out.exists()
    with pytest.raises(OutputError, match="can go on from here; pass --resume"):
        train(source, voc, out)
    with pytest.raises(OutputError, match="belongs to another run: weight_decay was"):
        train(source, voc, out, replace(TINY, weight_decay=0.1), resume=True)
    said = []
    files = train(source, voc, out, resume=True, say=said.append)
    assert "resuming after step 2" in said
    assert files.tensors.read_bytes() == trained.tensors.read_bytes()
    assert not state.exists()


def test_a_run_does_not_go_on_with_other_weights_of_the_same_file(source, voc, tmp_path):
    state = torch.load(source.checkpoint, weights_only=True)
    torch.save({"teacher": state, "student": state}, source.checkpoint)
    teacher, student = (replace(source, nesting=name) for name in ("teacher", "student"))
    out = tmp_path / "d.safetensors"

    train_and_kill(teacher, voc, out)
    with pytest.raises(OutputError, match="belongs to another run: place was teacher"):
        train(student, voc, out, resume=True)
    files = train(teacher, voc, out, resume=True)
    assert json.loads(files.record.read_text())["backbone"]["nesting"] == ["teacher"]


def test_a_last_step_to_infinity_is_not_written(source, voc, tmp_path):
    far = replace(TINY, learning_rate=1e38, weight_decay=1e10, batch_size=6)
    with pytest.raises(DivergedError, match="the last step left NaN or infinite weights"):
        train(source, voc, tmp_path / "d.safetensors", far)
    assert not list(tmp_path.glob("d.*"))


def test_nothing_is_replaced_without_being_told_to(source, voc, tmp_path, trained):
    before = trained.record.read_bytes()
    steps = []
    with pytest.raises(OutputError, match=r"d\.safetensors: exists already; pass --force"):
        train(source, voc, trained.tensors, on_step=lambda *step: steps.append(step))
    assert steps == []  # it is said before the work, not after
    assert trained.record.read_bytes() == before
    other = replace(TINY, seed=1)
    assert train(source, voc, trained.tensors, other, overwrite=True) == trained
    assert trained.record.read_bytes() != before


@pytest.mark.parametrize(
    ("out", "options", "error", "message"),
    [
        ("d.pt", {}, OutputError, r"d\.pt: a detector's file ends in \.safetensors"),
        ("no/d.safetensors", {}, OutputError, "there is no folder"),
        ("d.safetensors", {"resume": True}, OutputError, "there is nothing to resume"),
        (
            "d.safetensors",
            {"resume": True, "overwrite": True},
            SettingsError,
            "--force starts again and --resume goes on",
        ),
    ],
)
def test_a_bad_output_is_refused(source, voc, tmp_path, out, options, error, message):
    with pytest.raises(error, match=message):
        train(source, voc, tmp_path / out, **options)
    assert not list(tmp_path.glob("d.*"))


def test_a_folder_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(OutputError, match="is a folder; pass a file"):
        plan_files(tmp_path / "net.pt", tmp_path / "d.safetensors", overwrite=True, resume=False)


def test_the_input_is_never_the_output(source, voc, tmp_path):
    path = tmp_path / "d.safetensors"
    state = torch.load(source.checkpoint, weights_only=True)
    safetensors.torch.save_file(state, path)
    with pytest.raises(OutputError, match="would change the input"):
        train(replace(source, checkpoint=path), voc, path, overwrite=True)


def rewrite(files, **changed):
    record = json.loads(files.record.read_text())
    files.record.write_text(json.dumps({**record, **changed}))


def test_a_record_cannot_name_code_to_run(trained, tmp_path):
    code = tmp_path / "mine.py"
    code.write_text(f"open({str(tmp_path / 'boom')!r}, 'w')\n")
    rewrite(trained, arch=f"{code}:network")
    with pytest.raises(ArchitectureError, match="is run only if you name it yourself: --arch"):
        open_detector(trained.tensors)
    assert not (tmp_path / "boom").exists()


def test_ones_own_network_is_named_again_to_open_its_detector(source, voc, tmp_path):
    code = tmp_path / "mine.py"
    code.write_text(
        "from unbackdoor.networks import SMALL_NETWORKS\n"
        "def network():\n"
        "    made = SMALL_NETWORKS['wrn16_1'](10)\n"
        "    made.mean, made.std, made.size = (0.5,) * 3, (0.5,) * 3, 16\n"
        "    return made\n"
    )
    arch = f"{code}:network"
    files = train(replace(source, arch=arch), voc, tmp_path / "d.safetensors")
    assert json.loads(files.record.read_text())["arch"] == "mine.py:network"
    assert open_detector(files.tensors, arch=arch).size == 16


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"kind": "victim"}, CheckpointError, "is no detector's record .*its kind is 'victim'"),
        ({"classes": []}, CheckpointError, "names no class"),
        ({"classes": ["dog", "\x1b]0;x"]}, CheckpointError, r"'\\x1b\]0;x' is no name of a class"),
        ({"pixels": {"mean": "x"}}, CheckpointError, "is no detector's record"),
        ({"pixels": {**PIXELS, "size": float("inf")}}, CheckpointError, "images of inf pixels"),
        ({"pixels": {**PIXELS, "size": 0}}, CheckpointError, "images of 0 pixels"),
        ({"data": [1]}, CheckpointError, "is no detector's record"),
        ({"settings": {"pyramid": 10**9}}, CheckpointError, "pyramid must be .* at most 4096"),
        ({"settings": {"pyramid": "8"}}, CheckpointError, "pyramid is '8'"),
        ({"settings": {"piramid": 8}}, CheckpointError, "piramid is 8"),
        ({"classes": ["a", "b", "c"]}, MismatchError, "holds other tensors than its record"),
        ({"stages": ["block1", "block9"]}, ArchitectureError, "has no module 'block9'"),
    ],
)
def test_a_record_of_another_kind_is_refused(trained, changed, error, message):
    rewrite(trained, **changed)
    with pytest.raises(error, match=message):
        open_detector(trained.tensors)


def test_a_file_that_is_damaged_or_without_its_record_is_refused(trained):
    tensors = safetensors.torch.load_file(trained.tensors)
    tensors["backbone.body.conv1.weight"][0, 0, 0, 0] = float("nan")
    safetensors.torch.save_file(tensors, trained.tensors)
    with pytest.raises(CheckpointError, match="holds NaN or infinite weights"):
        open_detector(trained.tensors)
    trained.tensors.write_bytes(b"broken")
    with pytest.raises(CheckpointError):
        open_detector(trained.tensors)
    trained.record.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is no detector's record"):
        open_detector(trained.tensors)
    trained.record.unlink()
    with pytest.raises(CheckpointError, match=r"is no detector's record .*it lies beside"):
        open_detector(trained.tensors)
