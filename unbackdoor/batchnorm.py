"""Batch normalization's running statistics: a backdoor can hide behind them.

Statistics that moved to augmented and perturbed views mask a trigger until somebody re-estimates
them, so whoever tunes or scores a network has to say which statistics were in use.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from unbackdoor.errors import DataError
from unbackdoor.ranks import ALONE, Ranks, add_up, gather
from unbackdoor.types import Images

SAME_FEATURES = 1e-3  # of the largest feature: more than rounding in float32 leaves apart


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the batch-norm layers of ``module`` that keep running statistics."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    ]


def without_running_statistics(module: nn.Module) -> list[str]:
    """Return the names of batch-norm layers that always normalize by the batch."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and not layer.track_running_stats
    ]


def synchronized(module: nn.Module) -> list[str]:
    """Return the names of batch-norm layers that gather statistics of several processes."""
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.SyncBatchNorm)]


@contextmanager
def batch_statistics(
    module: nn.Module, *, batch: bool, moving: bool = True, ranks: Ranks = ALONE
) -> Iterator[None]:
    """Normalize by the statistics of each batch, or by the running ones, while inside.

    Only batch-norm layers change; dropout and the like stay as they are.

    Args:
        batch: Whether each batch's own statistics are used.
        moving: Whether they move the running ones.
        ranks: A batch is that of all of them together.
    """
    layers = batch_norms(module)
    before = [(layer.training, layer.momentum) for layer in layers]
    counted = [
        None if moving else layer.get_buffer("num_batches_tracked").clone() for layer in layers
    ]
    for layer in layers:
        layer.train(batch)
        if not moving:
            layer.momentum = 0.0
    try:
        whole = partial(whole_batch_norm, ranks=ranks)
        with BatchNormBy(whole) if batch and ranks.count > 1 else nullcontext():
            yield
    finally:
        for layer, (mode, momentum), count in zip(layers, before, counted, strict=True):
            layer.train(mode)
            layer.momentum = momentum
            if count is not None:
                layer.get_buffer("num_batches_tracked").copy_(count)


@contextmanager
def reference_statistics(module: nn.Module, views: int, *, ranks: Ranks = ALONE) -> Iterator[None]:
    """Let the first of ``views`` equal parts of a batch normalize all of it while inside.

    The running statistics take one step towards those of that part's images and then normalize the
    batch. Gradients pass through the mean and the variance of the part's images.

    Args:
        ranks: The statistics are those of all of them together.
    """
    by_reference = BatchNormBy(partial(whole_batch_norm, ranks=ranks, views=views))
    with (
        batch_statistics(module, batch=True),
        by_reference if batch_norms(module) else nullcontext(),
    ):
        yield


@torch.no_grad()
def reestimate(module: nn.Module, batches: Iterable[Images], *, ranks: Ranks = ALONE) -> None:
    """Replace the running statistics of ``module`` by the mean of those of all ``batches``.

    Nothing else changes; a network without batch norm stays as it is and reads no batch.

    Args:
        batches: Plain images in [0, 1], in batches of two images or more, of all ranks together.
            Each counts the same, so that they should be of about one size.

    Raises:
        DataError: If there is no batch; nothing has changed then.
    """
    layers = batch_norms(module)
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise DataError("no plain images to estimate batch-norm statistics on")
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative mean
    try:
        with batch_statistics(module, batch=True, ranks=ranks):
            for images in itertools.chain([first], rest):
                module(images)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


@torch.no_grad()
def fold(network: nn.Module, images: Images) -> int:
    """Let convolutions do what the batch norms right behind them do in eval mode, in place.

    What a batch norm elsewhere does becomes one multiplication and addition, whose gradient by the
    images is faster than that of PyTorch's. Weights and statistics stay the tensors that they were,
    so one that moves counts from then on. Only ``Conv2d`` and ``BatchNorm2d`` themselves are
    folded, none of their kinds with more in it.

    Args:
        network: In float32, as rounding may hide that its features change; in eval mode, in which
            it has to be used from now on.
        images: A few to try it on, in [0, 1]. Not modified.

    Returns:
        The number of batch norms that do nothing any more; 0 where features would change.
    """
    pairs = _convolutions_before_batch_norms(network, images)
    with _full_float32():
        before = network(images.clone())
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {
        norm: partial(_normalize, norm)
        for norm in batch_norms(network)
        if type(norm) is nn.BatchNorm2d and "forward" not in vars(norm)
    }
    for conv, norm in pairs:
        forwards |= {conv: partial(_convolve_and_normalize, conv, norm), norm: _as_it_came}
    for layer, forward in forwards.items():
        # The layers stay: others may ask for their weights, and hooks may compute them.
        layer.forward = forward
    with _full_float32():
        after = network(images.clone())
    if not (after - before).abs().max() <= SAME_FEATURES * before.abs().max():
        for layer in forwards:
            del layer.forward  # the class's is back
        return 0
    return len(pairs)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Do without TF32, whose rounding would look like features that change."""
    backend: Any = torch.backends.cudnn
    convolutions = backend.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def _convolve_and_normalize(conv: nn.Conv2d, norm: nn.BatchNorm2d, input: Tensor) -> Tensor:
    scale, shift = _scale_and_shift(norm)
    shift = shift if conv.bias is None else shift + conv.bias * scale
    weight = conv.weight * scale[:, None, None, None]
    kind = conv.weight.dtype
    output: Tensor = conv._conv_forward(input, weight.to(kind), shift.to(kind))
    return output


def _normalize(norm: nn.BatchNorm2d, input: Tensor) -> Tensor:
    return _scaled(input, *_scale_and_shift(norm))


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return by what ``norm`` multiplies channels in eval mode, and what it adds then."""
    scale = (norm.get_buffer("running_var") + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.get_buffer("running_mean") * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _as_it_came(input: Tensor) -> Tensor:
    return input


def _convolutions_before_batch_norms(
    network: nn.Module, images: Images
) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Return the pairs of which the second, and nothing else, reads what the first returns."""
    convolved: dict[Any, nn.Conv2d] = {}  # by the node of the graph
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d, Any]] = []
    calls: Counter[nn.Module] = Counter()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[layer] += 1
        if output.grad_fn is None:
            return
        if type(layer) is nn.Conv2d:
            convolved[output.grad_fn] = layer
        elif type(layer) is nn.BatchNorm2d and layer.track_running_stats:
            node = output.grad_fn.next_functions[0][0]  # that of its input
            if node in convolved:
                pairs.append((convolved[node], layer, node))

    layers = [
        layer
        for layer in network.modules()
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)) and not _is_special(layer)
    ]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.enable_grad():
            features = network(images.detach().requires_grad_(True) + 0)  # + 0: may be changed
    finally:
        for hook in hooks:
            hook.remove()
    readers = _readers(features)
    return [
        (conv, norm)
        for conv, norm, node in pairs
        if calls[conv] == calls[norm] == 1 and readers[node] == 1
    ]


def _is_special(layer: nn.Module) -> bool:
    """Return whether a layer does more than its class, or somebody's hook sees what it returns."""
    hooks = layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in vars(layer)


def _readers(features: Tensor) -> Counter[Any]:
    """Return how many operations read the output of each one on the way to ``features``."""
    readers: Counter[Any] = Counter()
    open_ends: list[Any] = [] if features.grad_fn is None else [features.grad_fn]
    seen = set(open_ends)
    while open_ends:
        for read, _ in open_ends.pop().next_functions:
            readers[read] += 1
            if read is not None and read not in seen:
                seen.add(read)
                open_ends.append(read)
    return readers


class BatchNormBy(TorchFunctionMode):
    """While inside, ``F.batch_norm``, in which every batch-norm layer ends, is another function."""

    def __init__(self, batch_norm: Callable[..., Tensor]):
        super().__init__()
        self.batch_norm = batch_norm

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the other function in its place."""
        return (self.batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def whole_batch_norm(
    images: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    ranks: Ranks,
    views: int = 0,
) -> Tensor:
    """Do what ``F.batch_norm`` does, with statistics of all ranks' batches; differentiable.

    With ``views``, do what :func:`reference_statistics` says; a layer without running statistics
    is then as ever. Its rows need not be images: LeViT's are tokens, image after image.
    """
    if not training or (views and running_mean is None):
        return F.batch_norm(
            images, running_mean, running_var, weight, bias, training, momentum, eps
        )
    counted = images[: len(images) // views] if views else images
    moments = _moments(counted, ranks)
    mean, variance = moments.mean, moments.variance
    if running_mean is not None and running_var is not None:
        unbiased = variance * moments.numbers / (moments.numbers - 1)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        if views:
            mean, variance = running_mean.clone(), running_var.clone()
            moments = moments._replace(divisor=moments.numbers - 1)
    normalized: Tensor = _Normalize.apply(
        images,
        torch.ones_like(mean) if weight is None else weight,
        torch.zeros_like(mean) if bias is None else bias,
        mean,
        variance + eps,
        len(counted),
        moments,
        ranks,
    )
    return normalized


class _Moments(NamedTuple):
    """Of every channel, over all ranks."""

    mean: Float[Tensor, " c"]
    variance: Float[Tensor, " c"]  # the mean square
    numbers: int  # behind each
    divisor: int  # of the sum of squares, where gradients pass


@torch.no_grad()
def _moments(images: Tensor, ranks: Ranks) -> _Moments:
    axes, shape = _channels(images)
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    own_mean = exact.mean(axes)
    squares = (exact - own_mean.view(shape)).square().mean(axes)
    means, variances = gather(torch.stack([own_mean, squares])[None], ranks).unbind(1)
    mean = means.mean(0)
    variance = variances.mean(0) + (means - mean).square().mean(0)
    numbers = ranks.count * exact.numel() // exact.shape[1]
    return _Moments(mean, variance, numbers, numbers)


class _Normalize(torch.autograd.Function):
    """Normalize by a mean and a variance that stand for the moments of the first rows.

    Gradients pass through these moments. With what autograd makes of the formulas, a training step
    of WRN-16-1 takes a fifth longer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        rows: int,
        moments: _Moments,
        ranks: Ranks,
    ) -> Tensor:
        ctx.save_for_backward(images, weight, mean, variance)
        ctx.rows, ctx.moments, ctx.ranks = rows, moments, ranks
        scale = variance.rsqrt() * weight
        return _scaled(images, scale, bias - mean * scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        images, weight, mean, variance = ctx.saved_tensors
        axes, shape = _channels(images)
        moments, gradient = ctx.moments, gradients[0].to(mean.dtype)
        per_deviation = variance.rsqrt()
        scale = per_deviation * weight
        by_bias = gradient.sum(axes)
        by_weight = ((images * gradient).sum(axes) - mean * by_bias) * per_deviation
        by_moments = torch.stack([by_bias, by_weight * per_deviation / 2]) * -scale
        add_up([by_moments], ctx.ranks)
        by_mean, by_variance = by_moments
        by_images = gradient * scale.view(shape)
        slope = 2 * by_variance / moments.divisor
        shift = by_mean / moments.numbers - slope * moments.mean
        by_images[: ctx.rows] += _scaled(images[: ctx.rows], slope, shift)
        return by_images, by_weight, by_bias, *[None] * 5


def _scaled(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Multiply channels and add to them; half-precision images are taken up and down again."""
    _, shape = _channels(images)
    return torch.addcmul(shift.view(shape), images, scale.view(shape)).to(images.dtype)


def _channels(images: Tensor) -> tuple[list[int], list[int]]:
    """Return all axes but the channels', and the shape in which channels meet ``images``."""
    return [axis for axis in range(images.ndim) if axis != 1], [1, -1] + [1] * (images.ndim - 2)
