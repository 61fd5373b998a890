"""Label-free evidence about a backbone: what purification kept, and what it changed.

Every number stands beside a control; none of them says "infected" or "safe".
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.cbd import search
from unbackdoor.changes import concentration, learn_changes
from unbackdoor.devices import told_of_memory
from unbackdoor.probe import extract
from unbackdoor.settings import PurifySettings
from unbackdoor.types import Features, Images, RawImages
from unbackdoor.views import random_views

MEASURED = 256  # images that a job measures the evidence on
NEIGHBOURS = 10
FEWEST = 8  # images in which a concentration can be told from chance


@dataclass(frozen=True)
class Evidence:
    """What can be said about a backbone without labels.

    Attributes:
        images: How many images the numbers come from.
        cosine: Mean cosine of an image's features to those of the original backbone; 1 is equal.
        neighbours: Share of an image's 10 nearest neighbours that it also has in the original.
        alignment: Mean squared distance of the unit features of two views; low is invariant.
        uniformity: Log of the mean pairwise Gaussian potential; low is spread out.
        adversarial: Mean cosine distance that the search's images move from their clean ones.
        noise: The same for the control: random noise of the same radius, or the same changes of all
            images before they were learned.
        concentration: How much the features of the search's images gather at one place, at most 1,
            see :func:`highest_concentration`; the highest of all changes where there are several.
            None on too few images.
        noise_concentration: The same for the control.
    """

    images: int
    cosine: float
    neighbours: float
    alignment: float
    uniformity: float
    adversarial: float
    noise: float
    concentration: float | None
    noise_concentration: float | None


def measure_both(
    backbone: nn.Module, original: nn.Module, images: RawImages, settings: PurifySettings
) -> dict[str, Evidence]:
    """Return what :func:`measure` finds before and after; ``original`` goes to the same device."""
    device = next(backbone.parameters()).device
    original.to(device)
    with told_of_memory(device):
        return {
            "before": measure(original, original, images, settings),
            "after": measure(backbone, original, images, settings),
        }


def measure(
    backbone: nn.Module,
    original: nn.Module,
    images: RawImages,
    settings: PurifySettings,
) -> Evidence:
    """Measure ``backbone`` against the ``original`` it came from, on unlabeled images.

    Args:
        backbone: Maps images in [0, 1] to features, in eval mode; may be the original itself.
        original: Likewise.
        images: On the CPU, shape ``(n, c, h, w)``; a few hundred are enough.
        settings: Radius, steps and views of the search; its seed.

    Source:
        Alignment and uniformity: Wang and Isola 2020, https://arxiv.org/abs/2005.10242.
    """
    device = next(backbone.parameters()).device
    generator = torch.Generator(device).manual_seed(settings.seed)
    size = settings.batch_size
    clean = extract(backbone, images, batch_size=size)
    before = clean if backbone is original else extract(original, images, batch_size=size)
    find = searcher(backbone, images, settings, generator=generator)
    views, searched, noisy = [], [], []
    for batch in images.split(size):
        if len(batch) < 2:
            continue  # one image has no negatives
        plain = batch.to(device).float() / 255
        a, b = (random_views(plain, settings.views, generator=generator) for _ in range(2))
        found, noise = find(a, plain)
        with torch.no_grad():
            views.append(torch.stack([backbone(a).cpu(), backbone(b).cpu()]))
            searched.append(backbone(found).cpu())
            noisy.append(backbone(noise).cpu())
    first, second = F.normalize(torch.cat(views, dim=1), dim=2)
    found_features, noise_features = torch.cat(searched), torch.cat(noisy)
    used = clean[: len(found_features)]
    which = torch.cat([torch.arange(len(part)) for part in searched])
    which = which % (settings.changes.count if settings.search.kind == "changes" else 1)
    return Evidence(
        images=len(images),
        cosine=F.cosine_similarity(clean, before).mean().item(),
        neighbours=neighbour_overlap(clean, before),
        alignment=(first - second).pow(2).sum(1).mean().item(),
        uniformity=(-2 * torch.pdist(first).pow(2)).exp().mean().log().item(),
        adversarial=(1 - F.cosine_similarity(used, found_features)).mean().item(),
        noise=(1 - F.cosine_similarity(used, noise_features)).mean().item(),
        concentration=highest_concentration(used, found_features, which),
        noise_concentration=highest_concentration(used, noise_features, which),
    )


def searcher(
    backbone: nn.Module, images: RawImages, settings: PurifySettings, *, generator: torch.Generator
) -> Callable[[Images, Images], tuple[Images, Images]]:
    """Return what makes of another view of images, and them, the searched ones and the control.

    Args:
        images: Where changes of all images are learned, if the search is for such.
    """
    if settings.search.kind != "changes":

        def around(view: Images, plain: Images) -> tuple[Images, Images]:
            found = search(backbone, view, plain, settings, generator=generator)
            return found, random_noise(plain, settings, generator=generator)

        return around

    learned, drawn = (
        learn_changes(
            backbone,
            images,
            replace(settings.changes, steps=steps),
            batch_size=settings.batch_size,
            generator=torch.Generator(generator.device).manual_seed(
                settings.seed
            ),  # the same twice
        )
        for steps in (settings.changes.steps, 0)
    )

    @torch.no_grad()
    def changed(_: Images, plain: Images) -> tuple[Images, Images]:
        return learned.apply(plain), drawn.apply(plain)

    return changed


def random_noise(images: Images, settings: PurifySettings, *, generator: torch.Generator) -> Images:
    """Return ``images`` with random noise as far away as the search may go, in [0, 1].

    L∞: every pixel moves by epsilon, up or down; L2: a random direction of length epsilon.
    """
    draws = torch.randn(images.shape, generator=generator, device=images.device)
    if settings.search.norm == "linf":
        shift = draws.sign()
    else:
        shift = draws / draws.flatten(1).norm(dim=1)[:, None, None, None]
    return (images + settings.search.epsilon * shift).clamp(0, 1)


def neighbour_overlap(a: Features, b: Features, *, neighbours: int = NEIGHBOURS) -> float:
    """Return the mean share of nearest neighbours, by cosine, that rows have in both spaces."""
    count = min(neighbours, len(a) - 1)

    def nearest(features: Features) -> torch.Tensor:
        unit = F.normalize(features, dim=1)
        similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
        chosen = similarity.topk(count, dim=1).indices
        return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, chosen, value=True)

    return (nearest(a) & nearest(b)).sum(1).float().mean().item() / count


def highest_concentration(clean: Features, moved: Features, which: Tensor) -> float | None:
    """Return the concentration of the rows that share a number, for the number where it is highest.

    It is that of ``changes.concentration`` without the share that a few scattered images have by
    chance: 0 is expected where they do not gather, 1 is all at one place. None where no number has
    ``FEWEST`` rows.

    Args:
        clean: Features of unchanged images, whose mean is the centre.
        moved: Features of changed ones; they are not whitened here, other than in the search.
        which: The number of each row of ``moved``, shape ``(n,)``.
    """
    found = []
    for number in which.unique():
        rows = moved[which == number]
        if (n := len(rows)) >= FEWEST:
            found.append((n * concentration(rows, clean.mean(0)).item() - 1) / (n - 1))
    return max(found, default=None)
