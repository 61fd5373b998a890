"""A Faster R-CNN on a backbone: its stages under a feature pyramid, stem and first stage frozen."""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN  # type: ignore[import-untyped]  # no types
from torchvision.models.detection.anchor_utils import (  # type: ignore[import-untyped]  # no types
    AnchorGenerator,
)
from torchvision.models.detection.faster_rcnn import (  # type: ignore[import-untyped]  # no types
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.ops import (  # type: ignore[import-untyped]  # no types
    FeaturePyramidNetwork,
    MultiScaleRoIAlign,
)
from torchvision.ops.feature_pyramid_network import (  # type: ignore[import-untyped]  # no types
    LastLevelMaxPool,
)
from torchvision.transforms.v2.functional import resize  # type: ignore[import-untyped]  # no types

from unbackdoor.backbones import Backbone
from unbackdoor.batchnorm import batch_norms
from unbackdoor.devices import Precision
from unbackdoor.errors import ArchitectureError
from unbackdoor.settings import DetectionSettings
from unbackdoor.types import RawImages

# Modules whose outputs are the maps of a pyramid, fine to coarse; the first of these that a
# network has is taken. `relu` of a wide ResNet follows its last stage, which ends unactivated.
STAGES: tuple[tuple[str, ...], ...] = (
    ("layer1", "layer2", "layer3", "layer4"),
    ("block1", "block2", "relu"),
    ("stages.0", "stages.1", "stages.2", "stages.3"),
)
POOLED = 7  # places of a box's features along each side
SIDE = 128  # pixels of the image that stages are tried on
FittedImages = UInt8[Tensor, "n c _ _"]


class Level(NamedTuple):
    """One stage of a backbone as a level of the pyramid."""

    stage: str
    channels: int
    stride: int


class Pyramid(nn.Module):
    """The maps of a backbone's stages, brought to one width and one more level; batch norm frozen.

    Args:
        body: The network without its heads; it is taken over.
        levels: Its stages.
        width: Channels of every map of the result.
        precision: ``bf16`` runs body and pyramid in bfloat16; the result is float32.
    """

    def __init__(
        self, body: nn.Module, levels: Sequence[Level], *, width: int, precision: Precision
    ):
        super().__init__()
        self.body = body
        self.stages = tuple(level.stage for level in levels)
        channels = [level.channels for level in levels]
        self.fpn = FeaturePyramidNetwork(channels, width, extra_blocks=LastLevelMaxPool())
        self.out_channels = width
        self.precision = precision

    def train(self, mode: bool = True) -> "Pyramid":
        """Switch to training or back; batch norm goes on by its running statistics."""
        super().train(mode)
        for layer in batch_norms(self.body):
            layer.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the levels by name, fine to coarse, of normalized images ``(n, c, h, w)``."""
        low = self.precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            maps = stage_maps(self.body, self.stages, images)
            levels = self.fpn(OrderedDict(zip(self.stages, maps, strict=True)))
        return OrderedDict((name, level.float()) for name, level in levels.items())


def find_levels(body: nn.Module, arch: str, stages: Sequence[str] = ()) -> tuple[Level, ...]:
    """Return the stages of a network, tried on one noise image.

    Args:
        body: In eval mode.
        arch: Its name, for messages.
        stages: Dotted names of modules, fine to coarse; by default :func:`known_stages`.

    Raises:
        ArchitectureError: If they are not known, or do not yield maps of which each is half as
            large as the one before, as a feature pyramid needs.
    """
    names = tuple(stages) or known_stages(body)
    if not names:
        raise ArchitectureError(
            f"{arch}: its stages are not known; name the modules whose outputs are maps, fine to "
            "coarse, by --stages, or take a ResNet. A vision transformer has one map only and "
            "carries no feature pyramid"
        )
    modules = dict(body.named_modules())
    if missing := [name for name in names if name not in modules]:
        raise ArchitectureError(f"{arch}: has no module {missing[0]!r}, which --stages names")
    noise = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            maps = stage_maps(body, names, noise)
    except ArchitectureError:
        raise
    except Exception as error:  # the network may raise anything
        line = str(error).partition("\n")[0]
        raise ArchitectureError(
            f"{arch}: fails on an image of {SIDE} × {SIDE} pixels ({line}); a detector needs a "
            "network for images of any size"
        ) from error
    levels = []
    for name, found in zip(names, maps, strict=True):
        if found.ndim != 4 or found.shape[2] != found.shape[3]:
            shape = tuple(found.shape)
            raise ArchitectureError(f"{arch}: {name} yields {shape}, which is no map (n, c, h, w)")
        levels.append(Level(name, found.shape[1], round(SIDE / found.shape[2])))
    strides = [level.stride for level in levels]
    if any(after != 2 * before for before, after in itertools.pairwise(strides)):
        raise ArchitectureError(
            f"{arch}: the maps of {', '.join(names)} have strides {strides}; in a feature pyramid "
            "each is twice the one before"
        )
    return tuple(levels)


def known_stages(body: nn.Module) -> tuple[str, ...]:
    """Return the stages of a network, fine to coarse; none where they are not known."""
    modules = dict(body.named_modules())
    return next((names for names in STAGES if all(name in modules for name in names)), ())


def stage_maps(body: nn.Module, stages: Sequence[str], images: Tensor) -> list[Tensor]:
    """Return the outputs of the modules ``stages`` when ``body`` runs on normalized images.

    Raises:
        ArchitectureError: If one of them does not run, or yields no tensor.
    """
    maps: dict[str, Tensor] = {}

    def keep(name: str, output: object) -> None:
        if not isinstance(output, Tensor):
            raise ArchitectureError(f"{name} yields a {type(output).__name__}, not one map")
        maps[name] = output

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        module = body.get_submodule(name)
        return module.register_forward_hook(lambda _, __, output: keep(name, output))

    handles = [hook(name) for name in stages]
    try:
        body(images)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in stages if name not in maps]:
        raise ArchitectureError(f"{missing[0]} does not run, and so yields no map")
    return [maps[name] for name in stages]


def make_detector(
    backbone: Backbone,
    levels: Sequence[Level],
    settings: DetectionSettings,
    *,
    classes: int,
    precision: Precision = "fp32",
) -> FasterRCNN:
    """Return a detector whose weights outside the backbone are new, drawn by the seed.

    It takes a list of images in [0, 1], each as :func:`fit` makes them, and scales no further. The
    backbone's network is taken over; its heads stay behind. Frozen weights take no gradient.

    Args:
        levels: What :func:`find_levels` returns for ``backbone.body``.
        classes: Without the background.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        pyramid = Pyramid(backbone.body, levels, width=settings.pyramid, precision=precision)
        strides = [level.stride for level in levels]
        strides.append(2 * strides[-1])
        detector = FasterRCNN(
            pyramid,
            min_size=settings.shorter,
            max_size=settings.longer,
            image_mean=backbone.mean.flatten().tolist(),
            image_std=backbone.std.flatten().tolist(),
            rpn_anchor_generator=AnchorGenerator(
                tuple((settings.anchor * stride,) for stride in strides),
                ((0.5, 1.0, 2.0),) * len(strides),
            ),
            box_roi_pool=MultiScaleRoIAlign(
                featmap_names=[level.stage for level in levels],
                output_size=POOLED,
                sampling_ratio=2,
            ),
            box_head=TwoMLPHead(settings.pyramid * POOLED**2, settings.box_head),
            box_predictor=FastRCNNPredictor(settings.box_head, classes + 1),
        )
    freeze(pyramid)
    return detector


def freeze(pyramid: Pyramid) -> None:
    """Let stem, first stage and batch norm of the backbone take no gradient, all else take one.

    The first stage is the network's own, also where the pyramid leaves it out, or that of the
    pyramid where the network's are not known.
    """
    pyramid.requires_grad_(True)
    first = (known_stages(pyramid.body) or pyramid.stages)[0]
    for module in run_before(pyramid.body, first):
        for weight in module.parameters(recurse=False):
            weight.requires_grad_(False)
    for layer in batch_norms(pyramid.body):
        layer.requires_grad_(False)


def run_before(body: nn.Module, stage: str) -> list[nn.Module]:
    """Return the modules with weights of their own that have run when ``stage`` ends.

    Found by running the network on noise, so that the order in which it lists its modules does
    not matter. ``body`` is left as it was.
    """
    started: list[nn.Module] = []
    ended = False

    def note(module: nn.Module, *_: object) -> None:
        if not ended:
            started.append(module)

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    modules = [m for m in body.modules() if list(m.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(note) for module in modules]
    handles.append(body.get_submodule(stage).register_forward_hook(end))
    weight = next(body.parameters())
    was_training = body.training
    try:
        with torch.no_grad():
            body.eval()(torch.zeros(1, 3, SIDE, SIDE, device=weight.device))
    finally:
        body.train(was_training)
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(started))


def fit(images: RawImages, settings: DetectionSettings) -> FittedImages:
    """Scale images to ``shorter`` pixels at the shorter side, ``longer`` at most at the other.

    Bilinear and antialiased; the shape of the image is kept.
    """
    height, width = images.shape[2:]
    scale = min(settings.shorter / min(height, width), settings.longer / max(height, width))
    sides = [max(1, round(scale * side)) for side in (height, width)]
    scaled: Tensor = resize(images, sides, antialias=True)
    return scaled
