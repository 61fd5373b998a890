"""Channel Lipschitz pruning (CLP): silence channels that could react too strongly. No data."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unbackdoor.backbones import Backbone
from unbackdoor.defenses.common import (
    Defended,
    DefenseData,
    copy_of,
    finished,
    zero_rows,
)
from unbackdoor.defenses.settings import ClpSettings
from unbackdoor.errors import ArchitectureError
from unbackdoor.types import OnStep


def prune_by_lipschitz(
    backbone: Backbone,
    data: DefenseData,
    settings: ClpSettings,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> Defended:
    """Return a copy of ``backbone`` without the channels whose Lipschitz bound stands out.

    Args:
        data: Used only for its shape: two noise images show which layers follow each other.

    Raises:
        ArchitectureError: If no convolution is followed by a batch norm.

    Source:
        Zheng et al. 2022, https://arxiv.org/abs/2208.03111.

    Differs from the paper: a convolution and a batch norm belong together if the one's output is
    the other's input, as seen in a pass, and not if one is listed after the other. Convolutions
    that end in a sum, as the last ones of pre-activation blocks, have no batch norm and stay.
    """
    repaired = copy_of(backbone, device)
    pairs = find_pairs(repaired, data.images.shape[-2:])
    if not pairs:
        raise ArchitectureError(
            "CLP needs batch norm right after a convolution, which this network has nowhere; "
            "bcu or contrastive need neither batch norm nor labels"
        )
    pruned: dict[str, list[int]] = {}
    for convolution, norm in pairs:
        layer, follower = (repaired.body.get_submodule(name) for name in (convolution, norm))
        assert isinstance(layer, nn.Conv2d)  # noqa: S101 - find_pairs yields nothing else
        assert isinstance(follower, _BatchNorm)  # noqa: S101
        channels = outliers(lipschitz_bounds(layer, follower), deviations=settings.deviations)
        if len(channels):
            zero_rows(follower, channels)
            pruned[norm] = channels.tolist()
    if on_step is not None:
        on_step(1, 1)
    return Defended(finished(repaired), {"pairs": len(pairs), "pruned": pruned})


@torch.no_grad()
def lipschitz_bounds(convolution: nn.Conv2d, norm: _BatchNorm) -> Float[Tensor, " channels"]:
    """Return each channel's bound: the kernel's spectral norm times the scale that follows it.

    The kernel of one output channel, ``(c, h, w)``, counts as a matrix of c rows.
    """
    kernels = convolution.weight.flatten(2).float()
    # on the CPU, for CUDA decomposes such small matrices one after the other
    spectral = torch.linalg.matrix_norm(kernels.cpu(), ord=2).to(kernels.device)
    variance = norm.get_buffer("running_var") + norm.eps
    bounds: Tensor = spectral * (norm.weight / variance.sqrt()).abs()
    return bounds


def outliers(bounds: Float[Tensor, " channels"], *, deviations: float) -> Tensor:
    """Return the channels whose bound exceeds the mean by ``deviations`` standard deviations."""
    return (bounds > bounds.mean() + deviations * bounds.std()).nonzero().flatten()


@torch.no_grad()
def find_pairs(backbone: Backbone, size: torch.Size) -> list[tuple[str, str]]:
    """Return every convolution whose output is a batch norm's input, with that batch norm."""
    made: dict[int, tuple[str, Tensor]] = {}
    pairs: list[tuple[str, str]] = []

    def after(name: str, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if isinstance(module, nn.Conv2d) and isinstance(output, Tensor):
            made[id(output)] = (name, output)  # kept alive, so that no other takes its place
        elif isinstance(module, _BatchNorm) and module.affine and module.track_running_stats:
            maker = made.get(id(inputs[0]))
            if maker is not None:
                pairs.append((maker[0], name))

    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: after(name, module, inputs, output)
        )
        for name, module in backbone.body.named_modules()
    ]
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, backbone.mean.shape[1], *size, generator=generator)
    try:
        backbone(noise.to(backbone.mean.device))
    finally:
        for hook in hooks:
            hook.remove()
    return pairs
