import copy
import json
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from unbackdoor.batchnorm import fold
from unbackdoor.devices import (
    compile_for_search,
    fast_layout,
    flops,
    frozen_twin,
    in_precision,
    matrix_limit,
    peak_memory,
    pick_device,
    pick_precision,
)
from unbackdoor.errors import SettingsError
from unbackdoor.networks import SMALL_NETWORKS

CPU = torch.device("cpu")
PROGRAM = Path(__file__).with_name("another_device.py")


def test_auto_is_what_the_machine_has():
    expected = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    assert pick_device("auto").type == expected
    assert pick_device("cpu") == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SettingsError, match="'cuda' is not available here; pass --device auto"):
        pick_device("cuda")


def test_a_cpu_computes_in_float32_unless_told_otherwise():
    assert pick_precision("auto", CPU) == "fp32"
    assert pick_precision("bf16", CPU) == "bf16"


def test_a_network_in_bfloat16_returns_float32_and_sees_changed_weights():
    network = torch.nn.Linear(64, 8)
    images = torch.rand(4, 64)
    rounded = in_precision(network, "bf16")
    with torch.no_grad():
        exact, before = network(images), rounded(images)
        assert before.dtype == torch.float32
        assert not before.equal(exact)
        torch.testing.assert_close(before, exact, atol=0.02, rtol=0.02)
        network.weight.mul_(2)
        assert not rounded(images).equal(before)
    assert in_precision(network, "fp32") is network


def test_the_peak_counts_what_was_allocated():
    before = peak_memory(CPU)
    block = torch.ones(before // 4 + 2**25)  # more than the peak so far
    assert peak_memory(CPU) > before
    del block


def test_operations_are_those_counted_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    images = torch.zeros(5, 3, 8, 8)
    # 36 places x 4 filters x 27 weights, and 144 x 10, two operations each
    assert flops(network, images) == 2 * (36 * 4 * 27 + 144 * 10)


def test_the_matrix_limit_is_more_than_one_small_product_reaches():
    device = torch.device("cpu")
    limit = matrix_limit(device, "fp32", size=512)
    assert 1e8 < limit < 1e15


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_twin_has_the_gradients_of_the_network_whose_weights_it_shares(
    compiled, folded, monkeypatch
):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SMALL_NETWORKS["wrn16_1"](10).eval().double()  # so that none is at a ReLU's edge
        images = torch.rand(4, 3, 16, 16).double()
    twin = frozen_twin(network)
    assert folded == (folded and fold(twin, images) > 0)
    if compiled:
        # No compiler follows the checks of types that the tests add: they draw at random.
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        compile_for_search(twin, images)

    def gradient(net):
        tried = images.clone().requires_grad_(True)
        return torch.autograd.grad(net(tried).square().sum(), tried)[0]

    first = gradient(network)
    torch.testing.assert_close(gradient(twin), first, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1.5)
    assert not gradient(network).allclose(first)
    torch.testing.assert_close(gradient(twin), gradient(network), rtol=1e-3, atol=1e-5)
    assert not any(weight.requires_grad for weight in twin.parameters())


@pytest.mark.slow
def test_however_many_networks_are_compiled_none_is_run_uncompiled(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = torch.rand(2, 3, 8, 8)
        layers = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval() for _ in range(3)]
    with torch._dynamo.config.patch(recompile_limit=2):
        for network in layers:
            twin = frozen_twin(network)
            assert fold(twin, images) > 0
            compile_for_search(twin, images)


def test_a_network_that_cannot_be_compiled_is_one_message(monkeypatch):
    def fail(self, **options):
        self.forward = lambda images: 1 / 0

    monkeypatch.setattr(nn.Module, "compile", fail)
    with pytest.raises(SettingsError, match=r"cannot be compiled here \(division by zero\)"):
        compile_for_search(nn.Conv2d(3, 1, 1), torch.ones(1, 3, 2, 2))


def test_a_twin_is_in_eval_mode_and_leaves_the_network_as_it_is():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(network.state_dict())
    twin = frozen_twin(network)
    twin(torch.rand(2, 3, 8, 8))
    assert network.training
    assert all(weight.requires_grad for weight in network.parameters())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_a_convolution_that_crashes_in_channels_last_is_left_contiguous():
    stem = nn.Conv2d(3, 48, 1, stride=2)
    assert fast_layout(nn.Sequential(stem)) == torch.contiguous_format
    for harmless in (nn.Conv2d(3, 48, 3, stride=2), nn.Conv2d(48, 96, 1, 2), nn.Conv2d(3, 9, 1)):
        assert fast_layout(nn.Sequential(harmless)) == torch.channels_last
        assert fast_layout(nn.Sequential(harmless), torch.device("mps")) == torch.contiguous_format


def run_on(device, folder):
    """Run all jobs on the CPU and on ``device``; returns the folders of what they wrote."""
    command = [sys.executable, str(PROGRAM), str(folder), device]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "cpu", folder / device


def read(path):
    return json.loads(path.read_text())


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_every_job_writes_on_another_device_what_it_writes_on_the_cpu(tmp_path):
    here, there = run_on("elsewhere", tmp_path)
    assert files_in(here) == files_in(there)
    for path in here.rglob("*.safetensors"):
        ours, theirs = load_file(path), load_file(there / path.relative_to(here))
        # victims are equal; a CPU folds what it searches with, and detectors have other kernels
        atol, rtol = (0, 0) if "seed0" in path.name else (5e-3, 1e-2)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=atol, rtol=rtol)
    moved = {}
    victim = load_file(here / "badnets-supervised-seed0.safetensors")
    for folder in (here, there):
        repaired = load_file(folder / "purified.safetensors")
        weights = [repaired[name] - victim[name] for name in victim if name.endswith("weight")]
        moved[folder] = torch.cat([change.flatten() for change in weights])
    assert (moved[there] - moved[here]).norm() < 0.1 * moved[here].norm()
    for name in ("scores", "transfer"):
        assert read(here / f"{name}.json")["scores"] == read(there / f"{name}.json")["scores"]
    rows = 0
    for path in (here / "cells").glob("*.json"):
        ours, theirs = read(path), read(there / "cells" / path.name)
        rows += 1
        if ["search.kind", "changes"] not in ours["cell"]["settings"]:  # folded, as above
            assert ours["scores"] == theirs["scores"]
    assert rows == 13  # nine baselines, both kinds of search, and two victims as they are


@pytest.mark.gpu
def test_every_job_runs_on_cuda_and_scores_about_as_on_the_cpu(tmp_path):
    here, there = run_on("cuda", tmp_path)
    assert files_in(here) == files_in(there)
    for path in (here / "cells").glob("*.json"):
        accuracy, other = (
            read(each)["scores"]["after"]["probe"]["acc"]
            for each in (path, there / "cells" / path.name)
        )
        assert other == pytest.approx(accuracy, abs=0.1)
