import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import test_cbd
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.cbd import epoch_batches, gradients, purify, steps_per_epoch
from unbackdoor.cli import main
from unbackdoor.data import from_tensor
from unbackdoor.errors import SettingsError
from unbackdoor.losses import nt_xent
from unbackdoor.pgd import l2_pgd, linf_pgd
from unbackdoor.ranks import ALONE, Ranks, add_up, draw, gather, gather_names, joined
from unbackdoor.settings import (
    ChangeSettings,
    ProjectionSettings,
    SearchSettings,
    ViewSettings,
)
from unbackdoor.views import random_views

TWO = (Ranks(0, 2), Ranks(1, 2))
OURS, QUICK = (replace(settings, batch_size=8) for settings in (test_cbd.OURS, test_cbd.QUICK))
CASES = {  # name -> with batch norm, settings
    "default, no batch norm": (False, OURS),
    "default": (True, OURS),
    "more changes than a rank has images": (
        False,
        replace(OURS, changes=ChangeSettings(3, additions=2, warps=3, steps=2)),
    ),
    "no batch norm": (False, QUICK),
    "l2": (False, replace(QUICK, search=SearchSettings("image", "l2", epsilon=1, steps=2))),
    "shared": (False, replace(QUICK, search=SearchSettings(kind="batch", steps=2))),
    "shared l2": (
        False,
        replace(QUICK, search=SearchSettings(kind="batch", norm="l2", epsilon=1, steps=2)),
    ),
    "last batch": (False, replace(QUICK, last_batch="keep", views=ViewSettings(blur=0.5))),
    "projection": (False, replace(QUICK, projection=ProjectionSettings(width=4, epochs=1))),
    "frozen": (True, replace(QUICK, batch_norm="frozen")),
    "reference": (True, replace(QUICK, batch_norm="reference")),
    "batch": (True, replace(QUICK, batch_norm="batch", search=SearchSettings("image", steps=1))),
    "joint": (
        True,
        replace(
            QUICK, batch_norm="joint", search=SearchSettings("image", steps=1, batch_norm="batch")
        ),
    ),
}


class Exact(nn.Module):
    """A small network in float64, so that what differs is not rounding."""

    def __init__(self, *, batch_norm, dtype=torch.float64):
        super().__init__()
        self.dtype = dtype  # of the features
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8) if batch_norm else nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ).double()

    def forward(self, images):
        return self.body(images.double()).to(self.dtype)


def network(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Exact(**{"batch_norm": False, **options}).eval()


def photos(count=20):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 10, 10), dtype=torch.uint8, generator=generator)


def purified(name, ranks=ALONE):
    batch_norm, settings = CASES[name]
    dtype = torch.float32 if settings.projection.width else torch.float64  # as the projection's
    net = network(batch_norm=batch_norm, dtype=dtype)
    result = purify(net, photos(), settings, ranks=ranks)
    losses = torch.tensor([epoch[:4] for epoch in result.history])
    return {**result.backbone.state_dict(), "losses": losses}


def gather_without_gradient(part, ranks):
    """Do what is often done: the own slot keeps its gradient, the others are constants."""
    parts = [torch.empty_like(part) for _ in range(ranks.count)]
    distributed.all_gather(parts, part.detach())
    parts[ranks.rank] = part
    return torch.cat(parts)


def naive_share(a, b, collect, ranks):
    """Return a rank's share of the contrastive loss of all ranks' rows, sum by sum."""
    everyone = F.normalize(torch.stack([collect(a, ranks), collect(b, ranks)]).flatten(0, 1))
    count, n = len(everyone) // 2, len(a)
    loss = 0
    for own in range(ranks.rank * n, (ranks.rank + 1) * n):
        for row, partner in ((own, own + count), (own + count, own)):
            similarity = everyone[row] @ everyone.T / 0.5
            others = torch.cat([similarity[:row], similarity[row + 1 :]])
            loss = loss + others.logsumexp(0) - similarity[partner]
    return loss / (2 * count)


def weight_gradients(loss, ranks=ALONE):
    """Return the gradients of a loss of two views, summed over the ranks."""
    net = network()
    views = photos(16).float() / 255
    a, b = (part.chunk(ranks.count)[ranks.rank] for part in views.split(8))
    loss(net(a), net(b)).backward()
    add_up(gradients(net), ranks)
    return {name: weight.grad for name, weight in net.named_parameters()}


def work(rank, folder):
    """Do on one of two ranks what the tests compare with one process."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    start = f"file://{folder}/start"
    distributed.init_process_group("gloo", init_method=start, rank=rank, world_size=2)
    ranks = Ranks(rank, 2)
    results = {name: purified(name, ranks) for name in CASES}
    losses = {
        "nt_xent": partial(nt_xent, ranks=ranks),
        "naive": partial(naive_share, collect=gather, ranks=ranks),
        "wrong": partial(naive_share, collect=gather_without_gradient, ranks=ranks),
    }
    results |= {name: weight_gradients(loss, ranks) for name, loss in losses.items()}
    results["names"] = gather_names([["b", "a"], ["c", "a"]][rank], ranks)
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_what_one_does_and_with_the_wrong_gather_they_do_not(tmp_path):
    # one test: starting two processes takes longer than all that they compute
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))

    for name in CASES:
        alone = purified(name)
        said = f"{name}: {{}}".format
        torch.testing.assert_close(first[name], alone, rtol=0, atol=1e-6, msg=said)
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0, msg=said)
        moved = alone["body.0.weight"] - network().body[0].weight
        assert moved.abs().max() > 1e-3, name

    alone = weight_gradients(nt_xent)
    naive = weight_gradients(partial(naive_share, collect=gather, ranks=ALONE))
    for found in (naive, first["nt_xent"], first["naive"]):
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)
    largest = max(gradient.abs().max() for gradient in alone.values())
    error = max((first["wrong"][name] - alone[name]).abs().max() for name in alone)
    assert error > 0.05 * largest

    assert first["names"] == second["names"] == ["a", "b", "c"]
    assert gather_names(["b", "a"], ALONE) == ["b", "a"]


@pytest.mark.parametrize("kind", [torch.rand, torch.randn])
def test_each_rank_draws_its_rows_of_what_one_process_draws(kind):
    def drawn(rows, ranks=ALONE):
        generator = torch.Generator().manual_seed(0)
        device = torch.device("cpu")
        return draw(kind, (rows, 3), generator=generator, device=device, ranks=ranks)

    assert torch.equal(torch.cat([drawn(2, ranks) for ranks in TWO]), drawn(4))


def test_views_and_starts_belong_to_images_and_not_to_ranks():
    images = photos(8).float() / 255
    options = {"epsilon": 0.1, "step_size": 0.1, "steps": 0}

    for make in (
        partial(random_views, settings=ViewSettings(blur=0.5)),
        partial(linf_pgd, torch.sum, **options),
        partial(l2_pgd, torch.sum, **options),
    ):
        whole = make(images=images, generator=torch.Generator().manual_seed(0))
        parts = [
            make(images=part, generator=torch.Generator().manual_seed(0), ranks=ranks)
            for part, ranks in zip(images.chunk(2), TWO, strict=True)
        ]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
        assert (whole[:4] - images[:4] - whole[4:] + images[4:]).abs().max() > 0.01


def test_the_ranks_parts_of_a_batch_are_the_batch():
    source, settings = from_tensor(photos(20)), replace(QUICK, last_batch="keep")
    whole, *parts = (list(epoch_batches(source, settings, 0, ranks)) for ranks in (ALONE, *TWO))
    assert [len(batch) for batch in whole] == [8, 8, 4]
    for batch, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(halves), batch)


def test_batches_that_cannot_be_shared_equally_are_refused():
    with pytest.raises(SettingsError, match=r"3 processes .* a batch of 8; pass --batch-size 9"):
        steps_per_epoch(20, QUICK, Ranks(0, 3))
    settings = replace(QUICK, last_batch="keep")
    with pytest.raises(SettingsError, match=r"2 processes .* last batch, of 3; pass --last-batch"):
        steps_per_epoch(19, settings, TWO[0])
    assert steps_per_epoch(17, settings, TWO[0]) == 2  # one image has no negatives


def test_a_layer_that_would_normalize_by_its_rank_alone_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(SettingsError, match=r"^1 always normalizes by the batch, .* run one"):
        purify(net, photos(), QUICK, ranks=TWO[0])


def test_a_layer_that_synchronizes_by_itself_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4))
    with pytest.raises(SettingsError, match=r"^1 is a SyncBatchNorm, .* with BatchNorm2d"):
        purify(net, photos(), QUICK, ranks=TWO[0])


def test_only_a_cpu_and_cuda_are_shared_and_one_process_joins_nothing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined(torch.device("mps")) as ranks:
        assert ranks == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(SettingsError, match="cannot share mps; pass --device cpu or cuda"),
        joined(torch.device("mps")),
    ):
        pass
    monkeypatch.setenv("RANK", "0")
    for count in ("4", ""):  # as a cluster may set it for programs of its own
        monkeypatch.setenv("WORLD_SIZE", count)
        with (
            pytest.raises(
                SettingsError, match=r"this: LOCAL_RANK, MASTER_ADDR, .*unset WORLD_SIZE"
            ),
            joined(torch.device("cpu")),
        ):
            pass


@pytest.fixture
def inputs(tmp_path):
    """Arguments for a victim and 20 photos; the network is slow, so that a kill comes in time."""
    (tmp_path / "net.py").write_text(
        "import time\n"
        "from torch import nn\n"
        "class Slow(nn.Module):\n"
        "    mean, std, size = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 10\n"
        "    def __init__(self, classes=2):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 8, 3)\n"
        "        self.bn = nn.BatchNorm2d(8)\n"
        "        self.fc = nn.Linear(8, classes)\n"
        "    def forward(self, x):\n"
        "        time.sleep(0.005)\n"
        "        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))\n"
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv.weight": (8, 3, 3, 3), "conv.bias": (8,), "fc.weight": (2, 8), "fc.bias": (2,)}
    shapes |= dict.fromkeys(("bn.weight", "bn.bias", "bn.running_mean"), (8,))
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["bn.running_var"] = torch.ones(8)
    save_file(tensors, tmp_path / "victim.safetensors")
    (tmp_path / "photos").mkdir()
    for i, photo in enumerate(photos()):
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(tmp_path / f"photos/{i:02}.png")
    (tmp_path / "photos/99.png").write_bytes(b"no image")
    return [
        *("purify", str(tmp_path / "victim.safetensors"), "--arch", f"{tmp_path}/net.py:Slow"),
        *("--images", str(tmp_path / "photos"), "--device", "cpu"),
        # not our search: Adam's steps amplify the rounding of float32
        *("--preset", "cifar10", "--batch-norm", "reference", "--search.steps", "1"),
        *("--epochs", "12", "--batch-size", "10"),
    ]


def start(arguments, processes=2):
    """Start the command line under torchrun."""
    options = ["--standalone", "--nproc-per-node", str(processes), "-m", "unbackdoor"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(arguments, processes=2):
    process = start(arguments, processes)
    said = process.communicate()[0]
    return process.returncode, said


@pytest.mark.slow
def test_torchrun_writes_one_file_like_that_of_one_process(inputs, tmp_path, capfd):
    code, said = run([*inputs, "--out", str(tmp_path / "two.safetensors")])
    assert code == 0, said
    assert said.count("wrote ") == 3
    assert said.count("epoch 1/12") == 1
    assert said.count("99.png") == 1
    assert main([*inputs, "--out", str(tmp_path / "one.safetensors")]) == 0
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    before = load_file(tmp_path / "victim.safetensors")
    assert (one["conv.weight"] - before["conv.weight"]).abs().max() > 1e-3
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[0]["images"] == records[1]["images"]
    written = {path.name for path in tmp_path.iterdir() if path.name.startswith("two")}
    assert written == {"two.safetensors", "two.json", "two.html"}


@pytest.mark.slow
def test_killed_processes_resume_to_the_same_file_but_not_with_another_number(
    inputs, tmp_path, capsys
):
    code, said = run([*inputs, "--out", str(tmp_path / "whole.safetensors")])
    assert code == 0, said
    killed = [*inputs, "--out", str(tmp_path / "killed.safetensors")]
    state = tmp_path / "killed.state.safetensors"
    process = start(killed)
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()  # torchrun ends its processes likewise, wherever they are
    process.communicate()
    assert state.exists()
    assert not (tmp_path / "killed.safetensors").exists()

    assert main([*killed, "--resume"]) == 2
    assert "processes was 2, now 1; resume as it was started" in capsys.readouterr().err
    assert state.exists()
    code, said = run([*killed, "--resume"])
    assert code == 0, said
    assert "resuming after epoch" in said
    whole, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    assert not state.exists()


@pytest.mark.slow
def test_an_error_is_one_message_a_process_and_ends_all_of_them(inputs, tmp_path):
    code, said = run([*inputs[:-1], "15", "--out", str(tmp_path / "x.safetensors")])
    assert code != 0
    told = r"^rank [01]: error: 2 processes cannot have .* of 15; pass --batch-size 16$"
    assert 1 <= len(re.findall(told, said, re.MULTILINE)) <= 2  # torchrun ends the slower one
    assert not list(tmp_path.glob("x.*"))
