"""Contrastive backdoor defense: purify a backbone with unlabeled images.

One step draws three views of a batch, makes of the third images whose features are not where they
should be (by a search near each, or by changes learned for all), and tunes the backbone on a
weighted sum of three terms.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.batchnorm import (
    batch_statistics,
    fold,
    reestimate,
    reference_statistics,
    synchronized,
    without_running_statistics,
)
from unbackdoor.changes import Pool, learn_changes
from unbackdoor.data import ImageSource, even_rows, from_tensor
from unbackdoor.devices import (
    Precision,
    compile_for_search,
    deterministic,
    frozen_twin,
    in_precision,
    laid_out,
)
from unbackdoor.errors import DataError, DivergedError, SettingsError
from unbackdoor.losses import nt_xent
from unbackdoor.pgd import l2_pgd, linf_pgd, shared_pgd
from unbackdoor.probe import extract
from unbackdoor.ranks import ALONE, Ranks, add_up, gather, own
from unbackdoor.settings import PurifySettings, SearchSettings
from unbackdoor.types import Features, Images, OnStep, RawImages, Scalar
from unbackdoor.views import random_views

ALIKE = 1e-6  # spread of features below which images are all the same to a network
COLLAPSED = 0.01  # share of the original's feature spread below which a student is given up
WATCHED = 512  # plain images on which that spread is read after every epoch
LEARNED_ON = 512  # plain images on which an epoch's changes are learned
FOLDED_ON = 8  # plain images on which a folded network has to have the same features
CHECK_EVERY = 20  # steps between looks at the loss, each of which waits for the device
REESTIMATED = 10_000  # plain images from which the delivered statistics are taken

Weights = Float[Tensor, " n"]  # of images; 1 in all, over all ranks
Comparison = Callable[[Features, Features, Weights], Scalar]


class Views(NamedTuple):
    """What one step makes of a batch."""

    anchor: Images  # the plain images where their statistics normalize all views
    positive: Images  # another view, for the align term
    clean: Images  # a third
    found: Images  # what the search made of the third


class LossTerms(NamedTuple):
    """The three terms of one step before weighting; a term of weight 0 is 0."""

    pull: Scalar  # found images -> where they belong, no gradient into that
    distill: Scalar  # anchor -> the same view under the frozen original
    align: Scalar  # two clean views of an image


class EpochLosses(NamedTuple):
    """Mean loss terms of one epoch, their weighted sum, and how long it took."""

    pull: float
    distill: float
    align: float
    total: float
    seconds: float


class PurifyState(NamedTuple):
    """What the epochs to come depend on, beside original, images and settings."""

    history: tuple[EpochLosses, ...]  # one entry a finished epoch
    student: dict[str, Tensor]
    momentum: dict[str, Tensor]  # SGD's buffers, named like the weights


class Purified(NamedTuple):
    """A purified backbone, in eval mode, and the losses of its epochs."""

    backbone: nn.Module
    history: tuple[EpochLosses, ...]


def purify(
    backbone: nn.Module,
    images: RawImages | ImageSource,
    settings: PurifySettings = PurifySettings(),
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    compiled: bool = False,
    ranks: Ranks = ALONE,
    state: PurifyState | None = None,
    on_step: OnStep | None = None,
    on_epoch: Callable[[PurifyState], None] | None = None,
) -> Purified:
    """Return a purified copy of ``backbone``, which itself stays as it is.

    Args:
        backbone: Maps images in [0, 1], shape ``(n, c, h, w)``, to features ``(n, d)``.
        images: Unlabeled images, a uint8 tensor or what ``load_images`` returns.
        settings: See :class:`PurifySettings`.
        device: Where to compute; the copy that is returned is there too.
        precision: ``bf16`` runs networks in bfloat16; weights and losses stay float32.
        compiled: Search on a compiled network: faster after half a minute, equal up to rounding.
        ranks: Purify together with other processes, which are all given the same; see ``joined``.
        state: Continue after its last epoch; on a CPU to the same bits as an uninterrupted run.
        on_step: Called after every step with the number of steps done and of all steps.
        on_epoch: Called after every epoch with the state to continue from.

    Raises:
        DataError: If the images do not fill one batch, or are all alike to the network.
        SettingsError: If ``state`` has more epochs than the settings ask for; if the ranks cannot
            have equal parts of a batch, or a layer would normalize by a part alone; if the network
            cannot be compiled.
        DivergedError: If the loss is no longer finite or the features collapse.

    Source:
        "Do We Really Need Labels for Backdoor Defense?", section 3.3,
        https://openreview.net/forum?id=0Hfv9xPBSPQ.

    Differs from the paper: by default, the search is for changes of all images at once, what
    it finds is brought back to the original's features by squared distance, and batch norm uses
    running statistics of plain images, through which gradients pass. docs/method.md has the
    reasons; the presets are the paper's. Nothing but batch norm ever leaves eval mode.
    """
    device = torch.device(device)
    source = from_tensor(images) if isinstance(images, Tensor) else images
    steps = settings.epochs * steps_per_epoch(len(source), settings, ranks)
    if ranks.count > 1:
        check_shared(backbone, settings)
    original = laid_out(copy.deepcopy(backbone).to(device).eval().requires_grad_(False))
    student = copy.deepcopy(original).eval().requires_grad_(True)
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    history = () if state is None else state.history
    if len(history) > settings.epochs:
        raise SettingsError(
            f"the state is of {len(history)} epochs, more than the {settings.epochs} asked for; "
            f"pass --epochs {len(history)}, or start again with --force"
        )

    network, network_before = (in_precision(net, precision) for net in (student, original))
    with deterministic():
        projection = train_projection(network_before, source, settings, device=device, ranks=ranks)
        embed, embed_original = (
            nn.Sequential(net, projection) for net in (network, network_before)
        )
        first = source.read(range(min(settings.batch_size // ranks.count, len(source))))
        searched = network_for_search(
            student,
            projection,
            _to_unit(first, device),
            settings,
            precision=precision,
            compiled=compiled,
        )
        if state is not None:
            _restore(state, student, optimizer)
            searched.eval()  # see below
        count = min(WATCHED, len(source))
        rows = even_rows(len(source), count - count % ranks.count)
        watched = source.read(rows[ranks.rank :: ranks.count])
        spread_of = partial(feature_spread, images=watched, batch_size=settings.batch_size)
        spread = spread_of(network_before, ranks=ranks)
        if spread < ALIKE:
            raise DataError(
                f"the network sees no difference between these images (spread {spread:.2g}); "
                "pass images that differ"
            )
        compare = comparison(settings, embed_original, watched, ranks=ranks)
        step = len(history) * (steps // settings.epochs)
        for epoch in range(len(history), settings.epochs):
            started, losses = time.monotonic(), []
            generator = epoch_generator(settings.seed, epoch, device)
            pool = None
            if settings.learns_changes:
                pool = _learn(searched, source, settings, generator=generator, ranks=ranks)
            for raw in epoch_batches(source, settings, epoch, ranks):
                plain = _to_unit(raw, device)
                anchor, positive, clean = (
                    random_views(plain, settings.views, generator=generator, ranks=ranks)
                    for _ in range(3)  # whether used or not: a seed means the same third view
                )
                if settings.batch_norm == "reference":
                    anchor = plain
                found = clean
                if pool is not None:
                    pool.advance(searched, clean, ranks=ranks)
                    with torch.no_grad():
                        found = pool.apply(clean, ranks=ranks)
                elif settings.pull > 0:
                    found = search(
                        searched, anchor, clean, settings, generator=generator, ranks=ranks
                    )
                views = Views(anchor, positive, clean, found)
                student.eval()  # see below: the search may have run it, without gradients
                terms = loss_terms(embed, embed_original, views, settings, compare, ranks=ranks)
                loss = weighted_sum(terms, settings)
                optimizer.param_groups[0]["lr"] = learning_rate(settings, step / steps)
                optimizer.zero_grad()
                loss.backward()
                add_up(gradients(student), ranks)
                if settings.clip > 0:
                    nn.utils.clip_grad_norm_(student.parameters(), settings.clip)
                optimizer.step()
                for tuned in (student, searched):
                    tuned.eval()  # drops what some networks keep of their weights in eval mode
                step += 1
                losses.append(torch.stack([*terms, loss]).detach())
                add_up(losses[-1:], ranks)
                if step % CHECK_EVERY == 0:
                    _check_finite(losses, epoch)
                if on_step is not None:
                    on_step(step, steps)
            _check_finite(losses, epoch)
            _check_spread(spread_of(network, ranks=ranks), spread, epoch)
            student.eval()  # likewise: what it kept has no gradient
            pull, distill, align, mean = torch.stack(losses).mean(0).tolist()
            seconds = time.monotonic() - started
            history = (*history, EpochLosses(pull, distill, align, mean, seconds))
            if on_epoch is not None:
                on_epoch(_state(student, optimizer, history))
        if settings.batch_norm == "reference":
            plain_batches = _plain_batches(source, settings, device, ranks)
            reestimate(network, plain_batches, ranks=ranks)
    student.to(memory_format=torch.contiguous_format)
    return Purified(student.requires_grad_(False), history)


def network_for_search(
    backbone: nn.Module,
    projection: nn.Module,
    images: Images,
    settings: PurifySettings,
    *,
    precision: Precision,
    compiled: bool,
) -> nn.Module:
    """Return ``backbone`` and ``projection`` as the search runs them, equal up to rounding.

    What is faster shares their tensors, so it follows those that are moved in place. On a CPU and
    where it is compiled, batch norms that use running statistics are folded into convolutions;
    elsewhere that would be more and smaller operations.

    Args:
        backbone: As it came: whether it can be folded must not hang on what tuning made of it.
        images: A batch to try it on, of the shape to come.

    Raises:
        SettingsError: If PyTorch cannot compile it here.
    """
    running = settings.search.kind == "changes" or settings.search.batch_norm == "running"
    folded = running and (compiled or images.device.type == "cpu")
    if settings.pull > 0 and (folded or compiled):
        backbone = frozen_twin(backbone)
        if folded:
            fold(backbone, images[:FOLDED_ON])
    searched = nn.Sequential(in_precision(backbone, precision), projection)
    if settings.pull > 0 and compiled:
        compile_for_search(searched, images)
    return searched


def search(
    embed: nn.Module,
    anchor: Images,
    images: Images,
    settings: PurifySettings,
    *,
    generator: torch.Generator,
    ranks: Ranks = ALONE,
) -> Images:
    """Return ``images``, changed so that their features leave where they were.

    Args:
        embed: Maps images to the features that the losses compare.
        anchor: Another view of the same images, or the plain ones.
        generator: Draws the starts; on the device of ``images``.
        ranks: Each has an equal part of a batch; negatives come from all of them.

    Source:
        ``image``: the paper's equation 3, PGD on the contrastive loss. ``batch`` and ``changes``
        are not in the paper; :func:`purify` learns changes over an epoch, and here they are new.
    """
    if settings.search.kind == "changes":
        raw = gather((images * 255).round().to(torch.uint8), ranks)
        pool = learn_changes(
            embed,
            raw,
            settings.changes,
            batch_size=settings.batch_size,
            generator=generator,
            ranks=ranks,
        )
        with torch.no_grad():
            return pool.apply(images, ranks=ranks)
    options = settings.search

    def loss_fn(candidates: Images) -> Scalar:
        return nt_xent(target, embed(candidates), temperature=settings.temperature, ranks=ranks)

    by_batch = options.batch_norm == "batch"
    with batch_statistics(embed, batch=by_batch, moving=False, ranks=ranks):
        with torch.no_grad():
            target = embed(anchor)
        ascend = linf_pgd if options.norm == "linf" else l2_pgd
        if options.kind == "batch":
            ascend = partial(shared_pgd, norm=options.norm)
        return ascend(
            loss_fn,
            images,
            epsilon=options.epsilon,
            step_size=step_length(options),
            steps=options.steps,
            generator=generator if options.start == "random" else None,
            ranks=ranks,
        )


def step_length(options: SearchSettings) -> float:
    """Return the length of a search step on the [0, 1] scale."""
    unit = {"epsilon": options.epsilon, "pixel": 1.0, "level": 1 / 255}[options.step_unit]
    return options.step_size * unit


def comparison(
    settings: PurifySettings, embed_original: nn.Module, images: RawImages, *, ranks: Ranks = ALONE
) -> Comparison:
    """Return how features are compared: two sets of them and weights to a loss, or a rank's share.

    Args:
        embed_original: The frozen original, up to the features that the losses compare.
        images: Plain ones; ``squared`` is in units of the variance of their features.

    NT-Xent compares every image with all others and has no weights.
    """
    if settings.loss == "contrastive":
        contrastive = partial(nt_xent, temperature=settings.temperature, ranks=ranks)
        return lambda a, b, weights: contrastive(a, b)
    features = extract(embed_original, images, batch_size=settings.batch_size)
    features = gather(features.to(next(embed_original.parameters()).device), ranks)
    variance = features.var(0).mean().clamp(min=1e-12)
    return lambda a, b, weights: (a - b).square().mean(1) @ weights / variance


def loss_terms(
    embed: nn.Module,
    embed_original: nn.Module,
    views: Views,
    settings: PurifySettings,
    compare: Comparison,
    *,
    ranks: Ranks = ALONE,
) -> LossTerms:
    """Return the pull, distill and align terms of one batch, or a rank's share of them.

    Args:
        embed: The network under repair, up to the features that the losses compare.
        embed_original: The frozen original, likewise.
        compare: See :func:`comparison`.
        ranks: Each has an equal part of the batch; the sum over all of them is the batch's.
    """
    anchor, positive, found = _embed_views(embed, views, settings, ranks)
    pull = distill = align = torch.zeros((), device=anchor.device)
    before = home = anchor.detach()
    with torch.no_grad():
        if settings.distill > 0 or settings.trim > 0:
            before = embed_original(views.anchor)
        if settings.pull > 0 and settings.anchor == "original":
            home = embed_original(views.clean)
    weights = trimmed_weights(anchor.detach(), before, settings.trim, ranks=ranks)
    if settings.pull > 0:
        pull = compare(home, found, weights)
    if settings.distill > 0:
        distill = compare(anchor, before, weights)
    if settings.align > 0:
        align = compare(anchor, positive, weights)
    return LossTerms(pull, distill, align)


def trimmed_weights(
    features: Features, before: Features, times: float, *, ranks: Ranks = ALONE
) -> Weights:
    """Return weights of images: 0 for those of a batch that moved much further than most.

    An image that carries the trigger is at the attacker's class in the original. As the backdoor
    goes it moves further than others, and held there it would keep the backdoor.

    Args:
        features: Under the network under repair.
        before: Of the same images under the original.
        times: Squared distances above so many times their median are left out; 0 keeps all.
        ranks: Each has a part of the batch; the median is over all of it.
    """
    moved = gather((features - before).square().sum(1), ranks)
    weights = torch.ones_like(moved)
    if times > 0:
        weights = (moved <= times * moved.sort().values[len(moved) // 2]).to(moved.dtype)
    return own(weights / weights.sum(), ranks)


def weighted_sum(terms: LossTerms, settings: PurifySettings) -> Scalar:
    """Return the paper's total loss."""
    return (
        settings.pull * terms.pull + settings.distill * terms.distill + settings.align * terms.align
    )


def _embed_views(
    embed: nn.Module, views: Views, settings: PurifySettings, ranks: Ranks
) -> tuple[Features, Features, Features]:
    """Return the features of anchor, positive and found; what has no weight is the anchor's."""
    used = [True, settings.align > 0, settings.pull > 0]
    three = views.anchor, views.positive, views.found
    wanted = [view for view, use in zip(three, used, strict=True) if use]
    if settings.batch_norm == "batch":
        with batch_statistics(embed, batch=True, ranks=ranks):
            features = [embed(view) for view in wanted]
    else:
        if settings.batch_norm == "reference":
            normalizing = reference_statistics(embed, len(wanted), ranks=ranks)
        else:
            joint = settings.batch_norm == "joint"
            normalizing = batch_statistics(embed, batch=joint, ranks=ranks)
        with normalizing:
            features = list(embed(torch.cat(wanted)).split(len(views.anchor)))
    anchor = features[0]
    rest = iter(features[1:])
    positive, found = (next(rest) if use else anchor for use in used[1:])
    return anchor, positive, found


def _learn(
    embed: nn.Module,
    source: ImageSource,
    settings: PurifySettings,
    *,
    generator: torch.Generator,
    ranks: Ranks,
) -> Pool:
    """Return the changes that an epoch begins with, learned on some of its images."""
    rows = torch.randperm(len(source), generator=generator, device=generator.device)[:LEARNED_ON]
    return learn_changes(
        embed,
        source.read(rows.tolist()),
        settings.changes,
        batch_size=settings.batch_size,
        generator=generator,
        ranks=ranks,
    )


def train_projection(
    backbone: nn.Module,
    source: ImageSource,
    settings: PurifySettings,
    *,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> nn.Module:
    """Return a projection head for ``backbone``, trained on the same images and then frozen.

    The head is linear, ReLU, linear, as SimCLR's; the backbone does not move. Without a projection
    in the settings, it is the identity.

    Not given in the paper: the head's width and the schedule of its training.
    """
    options = settings.projection
    if options.width == 0:
        return nn.Identity()
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        width_in = backbone(_to_unit(source.read([0, 1]), device)).shape[1]
    first, last = nn.Linear(width_in, width_in), nn.Linear(width_in, options.width)
    for layer in (first, last):
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    head = nn.Sequential(first, nn.ReLU(), last).to(device)
    optimizer = torch.optim.SGD(
        head.parameters(), lr=options.learning_rate, momentum=0.9, weight_decay=1e-4
    )
    for epoch in range(options.epochs):
        draws = epoch_generator(settings.seed, -1 - epoch, device)
        for raw in epoch_batches(source, settings, -1 - epoch, ranks):
            plain = _to_unit(raw, device)
            with torch.no_grad():
                a, b = (
                    backbone(random_views(plain, settings.views, generator=draws, ranks=ranks))
                    for _ in range(2)
                )
            loss = nt_xent(head(a), head(b), temperature=settings.temperature, ranks=ranks)
            optimizer.zero_grad()
            loss.backward()
            add_up(gradients(head), ranks)
            optimizer.step()
    return head.requires_grad_(False)


def gradients(module: nn.Module) -> list[Tensor]:
    """Return the gradients that the weights of ``module`` have."""
    return [weight.grad for weight in module.parameters() if weight.grad is not None]


def learning_rate(settings: PurifySettings, progress: float) -> float:
    """Return the rate at ``progress`` through the run, from 0 to 1."""
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def epoch_generator(seed: int, epoch: int, device: torch.device) -> torch.Generator:
    """Return the generator of one epoch's draws, so that a run can restart at any epoch."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + epoch) % 2**63)


def epoch_batches(
    source: ImageSource, settings: PurifySettings, epoch: int, ranks: Ranks = ALONE
) -> Iterator[RawImages]:
    """Yield the images of one epoch, or a rank's part of each batch, shuffled by seed and epoch."""
    shuffle = epoch_generator(settings.seed, epoch, torch.device("cpu"))
    order = torch.randperm(len(source), generator=shuffle)
    per_epoch = steps_per_epoch(len(source), settings, ranks)
    yield from _batches(source, order[: per_epoch * settings.batch_size], settings, ranks)


def steps_per_epoch(images: int, settings: PurifySettings, ranks: Ranks = ALONE) -> int:
    """Return how many batches ``images`` make; a batch of one has no negatives and is left out.

    Raises:
        DataError: If they make none.
        SettingsError: If the ranks cannot have equal parts of each.
    """
    full, rest = divmod(images, settings.batch_size)
    steps = full + (settings.last_batch == "keep" and rest >= 2)
    if steps == 0:
        raise DataError(
            f"{images} images do not fill one batch of {settings.batch_size}; "
            "pass more images or a smaller batch_size"
        )
    count, size = ranks.count, settings.batch_size
    if size % count:
        more = size + count - size % count
        raise SettingsError(
            f"{count} processes cannot have equal parts of a batch of {size}; "
            f"pass --batch-size {more}"
        )
    if steps > full and rest % count:
        raise SettingsError(
            f"{count} processes cannot have equal parts of the last batch, of {rest}; "
            "pass --last-batch drop"
        )
    return steps


def feature_spread(
    backbone: nn.Module, images: RawImages, *, batch_size: int, ranks: Ranks = ALONE
) -> float:
    """Return the variance of the unit features of all ranks' images, 0 (all alike) to 1."""
    unit = F.normalize(extract(backbone, images, batch_size=batch_size), dim=1)
    mean = unit.mean(0)
    if ranks.count > 1:
        mean = gather(mean[None].to(next(backbone.parameters()).device), ranks).mean(0)
    return 1 - mean.pow(2).sum().item()


def _to_unit(raw: RawImages, device: torch.device) -> Images:
    return raw.to(device, non_blocking=True).float() / 255


def _batches(
    source: ImageSource, order: Tensor, settings: PurifySettings, ranks: Ranks
) -> Iterator[RawImages]:
    """Yield this rank's part of each batch of the images ``order``."""
    size = settings.batch_size
    if ranks.count > 1:
        order = torch.cat([own(rows, ranks) for rows in order.split(size)])
    yield from source.batches(order, size // ranks.count)


def _plain_batches(
    source: ImageSource, settings: PurifySettings, device: torch.device, ranks: Ranks
) -> Iterator[Images]:
    """Yield up to ``REESTIMATED`` images, drawn by the seed, whole batches only.

    A folder is often in the order of its classes, and a batch of one of them varies too little.
    """
    count = min(len(source), REESTIMATED)
    count = count // settings.batch_size * settings.batch_size or count - count % ranks.count
    draws = epoch_generator(settings.seed, settings.epochs, torch.device("cpu"))  # of no epoch
    order = torch.randperm(len(source), generator=draws)[:count]
    for raw in _batches(source, order, settings, ranks):
        yield _to_unit(raw, device)


def check_shared(backbone: nn.Module, settings: PurifySettings) -> None:
    """Refuse a network whose batch norms several processes cannot share.

    Raises:
        SettingsError: If one has no running statistics, or none that a reference can replace.
    """
    if apart := without_running_statistics(backbone):
        raise SettingsError(
            f"{apart[0]} always normalizes by the batch, of which a process has a part; "
            "run one process"
        )
    if settings.batch_norm == "reference" and (own_way := synchronized(backbone)):
        raise SettingsError(
            f"{own_way[0]} is a SyncBatchNorm, whose statistics no reference can replace; build "
            "the network with BatchNorm2d, which several processes share as well"
        )


def _check_finite(losses: list[Tensor], epoch: int) -> None:
    if not torch.stack(losses).isfinite().all():
        raise DivergedError(
            f"epoch {epoch + 1}: the loss is no longer finite; "
            "start again with a lower learning_rate"
        )


def _check_spread(spread: float, original: float, epoch: int) -> None:
    if not spread > COLLAPSED * original:
        raise DivergedError(
            f"epoch {epoch + 1}: the features have collapsed, their spread is {spread:.2g} and was "
            f"{original:.2g}; start again with a larger distill or a lower learning_rate"
        )


def _state(
    student: nn.Module, optimizer: torch.optim.SGD, history: tuple[EpochLosses, ...]
) -> PurifyState:
    weights = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    return PurifyState(history, weights, momentum_of(optimizer, student))


def _restore(state: PurifyState, student: nn.Module, optimizer: torch.optim.SGD) -> None:
    student.load_state_dict(state.student)
    restore_momentum(optimizer, student, state.momentum)


def momentum_of(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """Return copies of the optimizer's momentum of a network's weights, by their names."""
    return {
        name: buffer.clone()
        for name, weight in network.named_parameters()
        if (buffer := optimizer.state.get(weight, {}).get("momentum_buffer")) is not None
    }


def restore_momentum(
    optimizer: torch.optim.Optimizer, network: nn.Module, momentum: Mapping[str, Tensor]
) -> None:
    """Give an optimizer the momentum that :func:`momentum_of` returned."""
    weights = dict(network.named_parameters())
    for name, kept in momentum.items():
        buffer = torch.empty_like(weights[name]).copy_(kept)  # and so of its layout
        optimizer.state[weights[name]]["momentum_buffer"] = buffer
