import pytest
import torch
from safetensors.torch import save_file

from unbackdoor.backbones import Source, build, open_backbone
from unbackdoor.errors import OutputError, SettingsError
from unbackdoor.outputs import plan_outputs, round_as_written


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clean.onnx", r"end it in .safetensors, .pt, .pth, .bin"),
        ("nowhere/clean.pt", "there is no folder"),
        ("victim.pth", "would change the input .*, which never happens; pass another file"),
        ("folder.pt", "is a folder; pass a file"),
        ("old.pt", "exists already; pass --force"),
    ],
)
def test_an_output_that_cannot_be_is_refused_first(name, message, tmp_path):
    victim = tmp_path / "victim.pth"
    (tmp_path / "old.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(OutputError, match=message):
        plan_outputs(victim, tmp_path / name, overwrite=name != "old.pt", resume=False)


@pytest.mark.parametrize("name", ["in/model.safetensors", "in/config.pt", "state.safetensors"])
def test_no_output_may_replace_the_input_or_a_part_of_it(name, tmp_path):
    (tmp_path / "in").mkdir()
    given = tmp_path / ("in" if "/" in name else "state.state.safetensors")
    with pytest.raises(OutputError, match="would change the input"):
        plan_outputs(given, tmp_path / name, overwrite=True, resume=False)


def test_starting_again_and_going_on_contradict(tmp_path):
    with pytest.raises(SettingsError, match="pass one of them"):
        plan_outputs(tmp_path / "victim.pth", tmp_path / "clean.pt", overwrite=True, resume=True)


def test_what_a_files_dtype_cannot_hold_is_told(tmp_path):
    network = build("cifar/wrn16_1").network.half()
    save_file(network.state_dict(), tmp_path / "x.safetensors")
    loaded = open_backbone(Source(tmp_path / "x.safetensors", "cifar/wrn16_1"))
    backbone = loaded.backbone
    backbone.body.bn1.running_var.fill_(1e6)
    with pytest.raises(OutputError, match=r"bn1\.running_var is beyond .*float16 .* 1e\+06"):
        round_as_written(loaded, backbone)
    backbone.body.bn1.running_var.fill_(float("inf"))  # not by rounding
    round_as_written(loaded, backbone)


def test_what_is_measured_is_rounded_as_it_is_written(tmp_path):
    tensors = build("cifar/wrn16_1").network.half().state_dict()
    save_file(tensors, tmp_path / "half.safetensors")
    loaded = open_backbone(Source(tmp_path / "half.safetensors", "cifar/wrn16_1", size=16))
    weight = loaded.backbone.body.conv1.weight
    with torch.no_grad():
        weight.add_(1e-5)
    kept = weight.detach().clone()
    round_as_written(loaded, loaded.backbone)
    assert weight.equal(kept.half().float())
    assert not weight.equal(kept)
