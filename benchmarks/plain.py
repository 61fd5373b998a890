"""The method as toolboxes write it, to measure ours against; each of its habits can be dropped.

Nothing here is slow on purpose: the views are torchvision's on PIL images, the search is the loop
of the textbook. With all habits dropped it is what a careful programmer writes in plain PyTorch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from unbackdoor.losses import nt_xent
from unbackdoor.settings import PurifySettings, ViewSettings
from unbackdoor.views import random_views

Views = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Habits:
    """What a plain loop does that costs time.

    Attributes:
        pil_views: Views are made image by image, and not for a batch at once on its device.
        full_backward: A search step computes gradients of all weights, which nobody uses.
        train_mode: The network stays in training mode in the search.
        anchor_again: The anchor's features are computed in every search step.
    """

    pil_views: bool = True
    full_backward: bool = True
    train_mode: bool = True
    anchor_again: bool = True


PLAIN = Habits()
CAREFUL = Habits(pil_views=False, full_backward=False, train_mode=False, anchor_again=False)


def pil_transform(settings: ViewSettings, size: int) -> v2.Transform:
    """Return the usual SimCLR transform of one PIL image, with our strengths."""
    jitter = 0.8 * settings.jitter
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(settings.min_area, 1)),
            v2.RandomHorizontalFlip(settings.flip),
            v2.RandomApply(
                [v2.ColorJitter(jitter, jitter, jitter, 0.2 * settings.jitter)],
                settings.jitter_probability,
            ),
            v2.RandomGrayscale(settings.grey),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


class ThreeViews(Dataset[Views]):
    """Three random views of each image, made when it is asked for."""

    def __init__(self, images: Tensor, settings: ViewSettings):
        self.images = [to_pil_image(image) for image in images]
        self.transform = pil_transform(settings, images.shape[-1])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, row: int) -> Views:
        """Return three views of one image."""
        first, second, third = (self.transform(self.images[row]) for _ in range(3))
        return first, second, third


def batches_of_views(
    images: Tensor,
    settings: PurifySettings,
    habits: Habits,
    *,
    device: torch.device,
    workers: int = 0,
) -> Iterator[Views]:
    """Yield three views of each batch on ``device``."""
    if habits.pil_views:
        dataset = ThreeViews(images, settings.views)
        for views in DataLoader(
            dataset, settings.batch_size, shuffle=True, drop_last=True, num_workers=workers
        ):
            first, second, third = (view.to(device) for view in views)
            yield first, second, third
        return
    generator = torch.Generator(device).manual_seed(settings.seed)
    order = torch.randperm(len(images))
    for rows in order.split(settings.batch_size):
        if len(rows) == settings.batch_size:
            plain = images[rows].to(device).float() / 255
            first, second, third = (
                random_views(plain, settings.views, generator=generator) for _ in range(3)
            )
            yield first, second, third


def search(
    network: nn.Module, anchor: Tensor, images: Tensor, settings: PurifySettings, habits: Habits
) -> Tensor:
    """Return images of the ball around ``images`` that the contrastive loss likes less."""
    options = settings.search
    network.train(habits.train_mode)
    with torch.no_grad():
        target = network(anchor)
    noise = torch.empty_like(images).uniform_(-options.epsilon, options.epsilon)
    adversarial = (images + noise).clamp(0, 1)
    for _ in range(options.steps):
        adversarial = adversarial.detach().requires_grad_(True)
        if habits.anchor_again:
            with torch.no_grad():
                target = network(anchor)
        loss = nt_xent(target, network(adversarial), temperature=settings.temperature)
        if habits.full_backward:
            network.zero_grad()
            loss.backward()
            gradient = adversarial.grad
        else:
            (gradient,) = torch.autograd.grad(loss, adversarial)
        moved = adversarial + options.step_size * options.epsilon * gradient.sign()
        change = (moved - images).clamp(-options.epsilon, options.epsilon)
        adversarial = (images + change).clamp(0, 1)
    return adversarial.detach()


def train(
    network: nn.Module,
    original: nn.Module,
    optimizer: torch.optim.Optimizer,
    views: Views,
    settings: PurifySettings,
    habits: Habits,
) -> None:
    """Tune the network by one batch: three passes, one loss, one step."""
    network.train(habits.train_mode)
    anchor, positive, found = (network(view) for view in views)
    with torch.no_grad():
        before = original(views[0])
    tau = settings.temperature
    loss = (
        settings.pull * nt_xent(anchor.detach(), found, temperature=tau)
        + settings.distill * nt_xent(anchor, before, temperature=tau)
        + settings.align * nt_xent(anchor, positive, temperature=tau)
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def purify(
    network: nn.Module,
    original: nn.Module,
    images: Tensor,
    settings: PurifySettings,
    habits: Habits,
    *,
    workers: int = 0,
) -> None:
    """Tune ``network`` in place by every epoch of the settings."""
    device = next(network.parameters()).device
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    for _ in range(settings.epochs):
        for anchor, positive, third in batches_of_views(
            images, settings, habits, device=device, workers=workers
        ):
            found = search(network, anchor, third, settings, habits)
            train(network, original, optimizer, (anchor, positive, found), settings, habits)
