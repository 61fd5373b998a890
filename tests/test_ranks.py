import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.cbd import epoch_batches, gradients, purify, steps_per_epoch
from unbackdoor.data import from_tensor
from unbackdoor.errors import SettingsError
from unbackdoor.losses import nt_xent
from unbackdoor.pgd import l2_pgd, linf_pgd
from unbackdoor.ranks import ALONE, Ranks, add_up, draw, gather, gather_names, joined
from unbackdoor.settings import ProjectionSettings, PurifySettings, SearchSettings, ViewSettings
from unbackdoor.views import random_views

TWO = (Ranks(0, 2), Ranks(1, 2))
QUICK = PurifySettings(epochs=2, batch_size=8, search=SearchSettings(steps=2))
CASES = {  # name -> with batch norm, settings
    "no batch norm": (False, QUICK),
    "l2": (False, replace(QUICK, search=SearchSettings(norm="l2", epsilon=1, steps=2))),
    "shared": (False, replace(QUICK, search=SearchSettings(shared=True, steps=2))),
    "shared l2": (
        False,
        replace(QUICK, search=SearchSettings(shared=True, norm="l2", epsilon=1, steps=2)),
    ),
    "last batch": (False, replace(QUICK, last_batch="keep", views=ViewSettings(blur=0.5))),
    "projection": (False, replace(QUICK, projection=ProjectionSettings(width=4, epochs=1))),
    "frozen": (True, replace(QUICK, batch_norm="frozen")),
    "tracked": (True, replace(QUICK, batch_norm="tracked")),
    "batch": (True, replace(QUICK, batch_norm="batch", search=SearchSettings(steps=1))),
    "joint": (
        True,
        replace(QUICK, batch_norm="joint", search=SearchSettings(steps=1, batch_norm="batch")),
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


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return what ``work`` computed on each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_purify_like_one_with_the_whole_batch(name, both):
    alone = purified(name)
    torch.testing.assert_close(both[0][name], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(both[1][name], both[0][name], rtol=0, atol=0)
    moved = alone["body.0.weight"] - network().body[0].weight
    assert moved.abs().max() > 1e-3


def test_gradients_are_those_of_one_process_and_those_of_the_wrong_gather_are_not(both):
    alone = weight_gradients(nt_xent)
    naive = weight_gradients(partial(naive_share, collect=gather, ranks=ALONE))
    torch.testing.assert_close(naive, alone, rtol=0, atol=1e-12)
    for name in ("nt_xent", "naive"):
        torch.testing.assert_close(both[0][name], alone, rtol=0, atol=1e-12)
    largest = max(gradient.abs().max() for gradient in alone.values())
    error = max((both[0]["wrong"][name] - alone[name]).abs().max() for name in alone)
    assert error > 0.05 * largest


def test_names_of_all_ranks_are_put_together(both):
    assert both[0]["names"] == both[1]["names"] == ["a", "b", "c"]
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
