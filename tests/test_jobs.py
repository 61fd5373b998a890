import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unbackdoor.backbones import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    Source,
    build,
    network_state,
    open_backbone,
)
from unbackdoor.checkpoint import sha256_of
from unbackdoor.data import load_images
from unbackdoor.diagnostics import measure
from unbackdoor.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    DivergedError,
    OutputError,
)
from unbackdoor.jobs import dry_run, purify_file
from unbackdoor.outputs import report_of
from unbackdoor.ranks import Ranks
from unbackdoor.settings import ChangeSettings, PurifySettings

QUICK = PurifySettings(
    epochs=2, batch_size=8, changes=ChangeSettings(1, additions=1, warps=3, steps=1)
)


@pytest.fixture
def photos(tmp_path, generator):
    folder = tmp_path / "photos" / "deep"
    folder.mkdir(parents=True)
    for i in range(20):
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    return str(tmp_path / "photos")


@pytest.fixture
def victim(tmp_path):
    """A file in the wild's style: nested, prefixed, with an optimizer and a projector."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build("cifar/wrn16_1", classes=4).network
    tensors = {f"module.{key}": value for key, value in network.state_dict().items()}
    tensors["module.projector.0.weight"] = torch.ones(2, 2)
    content = {
        "state_dict": tensors,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
        "epoch": 90,
    }
    path = tmp_path / "victim.pth"
    torch.save(content, path)
    return path


def run(victim, photos, out, settings=QUICK, **options):
    source = Source(victim, "cifar/wrn16_1", size=16)
    return purify_file(source, photos, out, settings, device="cpu", say=lambda _: None, **options)


def test_a_pt_output_drops_in_where_the_input_was(victim, photos, tmp_path):
    out = run(victim, photos, tmp_path / "clean.pt").tensors
    before, after = (torch.load(path, weights_only=True) for path in (victim, out))
    assert set(after) == {"state_dict"}
    assert list(after["state_dict"]) == list(before["state_dict"])
    changed = {
        key for key, old in before["state_dict"].items() if not old.equal(after["state_dict"][key])
    }
    assert "module.conv1.weight" in changed
    untouched = {"module.fc.weight", "module.fc.bias", "module.projector.0.weight"}
    assert changed & untouched == set()
    for key, old in before["state_dict"].items():
        assert old.dtype == after["state_dict"][key].dtype


def test_a_tensor_under_two_names_is_repaired_under_both(victim, photos, tmp_path):
    content = torch.load(victim, weights_only=True)
    weights = content["state_dict"]
    weights["module.features.0.weight"] = weights["module.conv1.weight"]
    torch.save(content, victim)
    before = weights["module.conv1.weight"].clone()
    for name in ("one.pt", "two.safetensors"):
        out, record, *_ = run(victim, photos, tmp_path / name)
        shared = json.loads(record.read_text())["matched"]["shared"]
        assert shared == ["state_dict.module.features.0.weight"]
        after = (
            load_file(out)
            if out.suffix == ".safetensors"
            else torch.load(out, weights_only=True)["state_dict"]
        )
        assert not after["module.conv1.weight"].equal(before)
        assert after["module.features.0.weight"].equal(after["module.conv1.weight"])


def test_the_record_is_written_last(victim, photos, tmp_path):
    report = tmp_path / "clean.html"

    def block(done, steps):
        report.mkdir(exist_ok=True)  # so that the report cannot be written

    with pytest.raises(OutputError):
        run(victim, photos, tmp_path / "clean.safetensors", on_step=block)
    assert (tmp_path / "clean.safetensors").exists()
    assert not (tmp_path / "clean.json").exists()
    assert (tmp_path / "clean.state.safetensors").exists()  # what was computed is not lost
    report.rmdir()
    outputs = run(victim, photos, tmp_path / "clean.safetensors", resume=True)
    assert outputs.record.exists()


def test_a_safetensors_output_is_flat_and_tells_where_it_comes_from(victim, photos, tmp_path):
    outputs = run(victim, photos, tmp_path / "clean.safetensors")
    old = torch.load(victim, weights_only=True)["state_dict"]
    assert set(load_file(outputs.tensors)) == set(old)
    with safetensors.safe_open(outputs.tensors, framework="pt") as file:
        metadata = file.metadata()
    record = json.loads(outputs.record.read_text())
    assert record["output_sha256"] == sha256_of(outputs.tensors)
    provenance = json.loads(metadata["unbackdoor"])
    assert provenance["input"] == record["input"]
    assert provenance["settings"]["changes"]["steps"] == 1
    assert record["input"]["name"] == "victim.pth"
    assert record["dropped"] == ["optimizer (dict)", "epoch (int)"]
    assert record["mean"] == pytest.approx(CIFAR10_MEAN)
    assert record["std"] == pytest.approx(CIFAR10_STD)
    assert record["images"]["count"] == 20
    assert len(record["history"]) == 2
    assert record["evidence"]["before"]["cosine"] == pytest.approx(1)
    assert record["evidence"]["after"]["cosine"] < 1
    assert str(tmp_path) not in outputs.record.read_text() + str(metadata)
    assert not outputs.state.exists()
    page = outputs.report.read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "Label-free evidence" in page
    assert "Changes of all images, learned so that" in page
    around = {**record, "settings": {**record["settings"], "search": {"kind": "image"}}}
    assert "Images searched for by the contrastive loss moved them by" in report_of(around)
    assert "https://" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_output_is_read_like_the_input_and_repeats_bit_for_bit(victim, photos, tmp_path):
    first = run(victim, photos, tmp_path / "a.safetensors").tensors
    second = run(victim, photos, tmp_path / "b.pt").tensors
    one, other = (
        network_state(open_backbone(Source(path, "cifar/wrn16_1", size=16)).backbone)
        for path in (first, second)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_run_without_any_loss_is_written_too(victim, photos, tmp_path):
    alone = {"pull": 0.0, "align": 0.0, "distill": 1.0, "batch_norm": "frozen", "weight_decay": 0.0}
    source, out = Source(victim, "cifar/wrn16_1", size=16), tmp_path / "clean.safetensors"
    outputs = purify_file(source, photos, out, replace(QUICK, **alone), device="cpu")
    losses = [epoch["total"] for epoch in json.loads(outputs.record.read_text())["history"]]
    assert losses == [0.0, 0.0]
    assert "Losses" in outputs.report.read_text()


def test_half_precision_files_stay_half_precision(photos, tmp_path):
    tensors = build("cifar/wrn16_1").network.half().state_dict()
    save_file(tensors, tmp_path / "half.safetensors")
    outputs = run(tmp_path / "half.safetensors", photos, tmp_path / "clean.safetensors")
    assert load_file(outputs.tensors)["conv1.weight"].dtype == torch.float16
    before, after = (
        open_backbone(Source(path, "cifar/wrn16_1", size=16)).backbone
        for path in (tmp_path / "half.safetensors", outputs.tensors)
    )
    again = measure(after, before, load_images(photos, size=16).read(range(20)), QUICK)
    said = json.loads(outputs.record.read_text())["evidence"]["after"]
    for name in ("cosine", "alignment", "adversarial"):  # of the rounded weights, as delivered
        assert said[name] == pytest.approx(getattr(again, name), rel=1e-6, abs=1e-9), name


def test_an_output_that_could_not_hold_the_tensors_is_refused_first(victim, photos, tmp_path):
    content = torch.load(victim, weights_only=True)
    content["state_dict"]["__metadata__"] = torch.ones(1)
    torch.save(content, victim)
    said = []
    with pytest.raises(OutputError, match=r"cannot hold '__metadata__' of torch\.float32"):
        run(victim, photos, tmp_path / "clean.safetensors", on_step=lambda *step: said.append(step))
    assert not said
    run(victim, photos, tmp_path / "clean.pt")


def test_complex_weights_are_refused(victim, photos, tmp_path):
    content = torch.load(victim, weights_only=True)
    weights = content["state_dict"]
    weights["module.conv1.weight"] = weights["module.conv1.weight"].to(torch.complex64)
    torch.save(content, victim)
    with pytest.raises(CheckpointError, match=r"conv1\.weight is of complex numbers"):
        run(victim, photos, tmp_path / "clean.pt")


def test_a_killed_run_resumes_to_the_same_file(victim, photos, tmp_path):
    class KilledError(BaseException):
        pass

    def kill(step, steps):
        if step == 3:  # in the second epoch
            raise KilledError

    whole = run(victim, photos, tmp_path / "whole.safetensors").tensors
    with pytest.raises(KilledError):
        run(victim, photos, tmp_path / "killed.safetensors", on_step=kill)
    assert not (tmp_path / "killed.safetensors").exists()
    with pytest.raises(OutputError, match="can go on from here; pass --resume to its command"):
        run(victim, photos, tmp_path / "killed.safetensors")
    options = {"resume": True, "ranks": Ranks(0, 2)}
    with pytest.raises(OutputError, match="processes was 1, now 2; resume as it was started"):
        run(victim, photos, tmp_path / "killed.safetensors", **options)
    resumed = run(victim, photos, tmp_path / "killed.safetensors", resume=True).tensors
    torch.testing.assert_close(load_file(whole), load_file(resumed), rtol=0, atol=0)


def test_an_input_that_changes_while_it_is_purified_is_not_mixed_with_what_it_was(
    victim, photos, tmp_path
):
    before = victim.read_bytes()

    def change(step, steps):
        if step == steps:
            victim.write_bytes(before + bytes(1))

    out = tmp_path / "clean.safetensors"
    with pytest.raises(CheckpointError, match="was changed while it was in use; put back what"):
        run(victim, photos, out, on_step=change)
    assert not out.exists()
    victim.write_bytes(before)
    assert run(victim, photos, out, resume=True).tensors.is_file()


def test_a_diverged_run_keeps_the_last_good_epoch(victim, photos, tmp_path):
    out = tmp_path / "clean.safetensors"
    constant = replace(QUICK, schedule="constant")  # with a cosine, epochs are part of the schedule

    def poison_weights(step, steps):
        if step == 3:
            torch.nn.Module.__call__ = broken

    original = torch.nn.Module.__call__

    def broken(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return result * float("nan") if isinstance(result, torch.Tensor) else result

    try:
        with pytest.raises(DivergedError, match=r"epoch 2: .*; the last good epoch is kept in"):
            run(victim, photos, out, constant, on_step=poison_weights)
    finally:
        torch.nn.Module.__call__ = original
    assert not out.exists()
    kept = run(victim, photos, out, replace(constant, epochs=1), resume=True)
    assert len(json.loads(kept.record.read_text())["history"]) == 1


@pytest.mark.parametrize("work", [purify_file, dry_run])
def test_a_batch_too_large_for_the_memory_is_named(work, victim, photos, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\n"
        "from unbackdoor.networks import SMALL_NETWORKS\n"
        "def greedy(classes):\n"
        "    network = SMALL_NETWORKS['wrn16_1'](classes)\n"
        "    def take(module, inputs):\n"
        "        if len(inputs[0]) > 2:\n"
        "            torch.empty(10**15)\n"
        "    network.register_forward_pre_hook(take)\n"
        "    return network\n"
    )
    source = Source(victim, f"{own}:greedy", size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(DeviceError, match=r"cpu is out of memory; .* pass a smaller --batch"):
        work(source, photos, tmp_path / "x.pt", QUICK, device="cpu", say=lambda _: None)


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(victim, photos, tmp_path):
    lines = []
    before = sorted(tmp_path.rglob("*"))
    estimate = dry_run(
        Source(victim, "cifar/wrn16_1", size=16),
        photos,
        tmp_path / "clean.pt",
        QUICK,
        device="cpu",
        say=lines.append,
    )
    assert sorted(tmp_path.rglob("*")) == before
    assert estimate.steps == 4
    assert estimate.seconds_per_step > 0
    assert estimate.seconds_to_learn > 0
    assert estimate.memory > 2**20
    text = "\n".join(lines)
    assert "80 of 80 body tensors" in text
    assert "64 features; pixels less mean 0.4914, 0.4822, 0.4465, over std 0.247, 0.2435" in text
    assert "wrote nothing" in text


def test_a_run_says_what_it_changed(victim, photos, tmp_path):
    said = []
    source = Source(victim, "cifar/wrn16_1", size=16)
    out = tmp_path / "clean.pt"
    outputs = purify_file(source, photos, out, QUICK, device="cpu", say=said.append)
    after = json.loads(outputs.record.read_text())["evidence"]["after"]
    told = [line for line in said if line.startswith("clean features keep a cosine of")]
    assert len(told) == 1
    assert f"cosine of {after['cosine']:.3f} to the original" in told[0]
    assert f"searched images move by {after['adversarial']:.3f}, before by" in told[0]


def test_a_dry_run_takes_what_a_run_takes(victim, photos, tmp_path):
    """Three images are fewer than the changes, which are at most as many as a batch is to have."""
    source, out = Source(victim, "cifar/wrn16_1", size=16), tmp_path / "clean.pt"
    asked = replace(QUICK, epochs=1, last_batch="keep")
    assert 3 < asked.changes.count <= asked.batch_size
    told = {"limit": 3, "device": "cpu", "say": lambda _: None}
    assert dry_run(source, photos, out, asked, **told).steps == 1
    assert purify_file(source, photos, out, asked, **told).record.exists()
    with pytest.raises(DataError, match="3 images do not fill one batch of 8"):
        dry_run(source, photos, out, replace(asked, last_batch="drop"), overwrite=True, **told)


def test_a_dry_run_refuses_what_a_run_refuses(victim, photos, tmp_path):
    source, out = Source(victim, "cifar/wrn16_1", size=16), tmp_path / "clean.pt"
    told = {"device": "cpu", "say": lambda _: None}
    out.touch()
    with pytest.raises(OutputError, match="exists already; pass --force"):
        dry_run(source, photos, out, QUICK, **told)
    assert dry_run(source, photos, out, QUICK, overwrite=True, **told).steps > 0
    assert out.read_bytes() == b""


def test_few_images_and_the_device_are_told(victim, photos, tmp_path):
    said = []
    source, options = Source(victim, "cifar/wrn16_1", size=16), {"device": "cpu", "limit": 8}
    purify_file(source, photos, tmp_path / "clean.pt", QUICK, say=said.append, **options)
    assert any(line.startswith("on cpu, ") and line.endswith("fp32") for line in said)
    assert any(line.startswith("warning: 8 images make 2 steps in all") for line in said)


def test_a_state_of_another_network_is_refused(victim, photos, tmp_path):
    out = tmp_path / "clean.safetensors"

    def stop(step, steps):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(victim, photos, out, on_step=stop)
    other = Source(victim, "cifar/wrn16_1", size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(OutputError, match="belongs to another run: mean was"):
        purify_file(other, photos, out, QUICK, device="cpu", resume=True, say=lambda _: None)


def test_too_few_images_are_refused_before_anything_runs(victim, photos, tmp_path):
    with pytest.raises(DataError, match="20 images do not fill one batch of 64"):
        run(victim, photos, tmp_path / "clean.pt", replace(QUICK, batch_size=64))
    assert not list(tmp_path.glob("clean*"))


SMALL = {
    "timm/test_resnet": 64,
    "timm/test_convnext": 64,
    "timm/test_vit": 160,
}


@pytest.mark.parametrize("arch", SMALL)
def test_resnet_convnext_and_vit_are_purified(arch, photos, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(arch, classes=3).network
    victim: Path = tmp_path / "victim.safetensors"
    save_file(network.state_dict(), victim)
    settings = replace(QUICK, epochs=1)
    source = Source(victim, arch, size=SMALL[arch])
    outputs = purify_file(
        source, photos, tmp_path / "clean.safetensors", settings, device="cpu", say=lambda _: None
    )
    old, new = load_file(victim), load_file(outputs.tensors)
    assert list(old) == list(new)
    heads = [key for key in old if key.startswith(("fc.", "head.fc.", "head."))]
    changed = [key for key in old if not old[key].equal(new[key])]
    assert len(changed) > len(old) / 2
    kept = [key for key in heads if old[key].shape[0] == 3]
    assert kept
    assert not set(kept) & set(changed)
