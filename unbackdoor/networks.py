"""Networks for small images (28 to 64 pixels), which timm and torchvision lack.

Module names follow the code that most public checkpoints of each network were trained with, so
that their keys fit: torchvision's for ResNets, ``layer1.0.shortcut.0`` and ``linear`` for PreAct
ResNets, ``block1.layer.0.convShortcut`` for wide ResNets.
"""

from collections.abc import Callable

import torch
import torchvision  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def small_resnet(name: str, *, classes: int) -> nn.Module:
    """Return torchvision's ResNet ``name`` with a 3×3 stem of stride 1 and no max-pool.

    Source:
        SimCLR, appendix B.9, https://arxiv.org/abs/2002.05709.
    """
    network: nn.Module = getattr(torchvision.models, name)(num_classes=classes)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each of two 3×3 convolutions; the shortcut follows the first."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus its residual."""
        activated = F.relu(self.bn1(x))
        shortcut = self.shortcut(activated) if hasattr(self, "shortcut") else x
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return shortcut + residual


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 for 32-pixel images, 512 features.

    Differs from the paper: no batch norm after the last stage, as in the network that the field's
    toolboxes train under this name, so that their checkpoints fit.

    Source:
        He et al. 2016, https://arxiv.org/abs/1603.05027.
    """

    def __init__(self, *, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(64, 64, 1), PreActBlock(64, 64, 1))
        self.layer2 = nn.Sequential(PreActBlock(64, 128, 2), PreActBlock(128, 128, 1))
        self.layer3 = nn.Sequential(PreActBlock(128, 256, 2), PreActBlock(256, 256, 1))
        self.layer4 = nn.Sequential(PreActBlock(256, 512, 2), PreActBlock(512, 512, 1))
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(n, classes)``."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class WideBlock(nn.Module):
    """Pre-activation block whose shortcut follows the first activation where the width changes."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        if width_in != width:
            self.convShortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus its residual."""
        activated = F.relu(self.bn1(x))
        shortcut = self.convShortcut(activated) if hasattr(self, "convShortcut") else x
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return shortcut + residual


class WideGroup(nn.Module):
    """Blocks of one width; the first may halve the resolution."""

    def __init__(self, width_in: int, width: int, *, blocks: int, stride: int):
        super().__init__()
        self.layer = nn.Sequential(
            WideBlock(width_in, width, stride),
            *(WideBlock(width, width, 1) for _ in range(blocks - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        maps: Tensor = self.layer(x)
        return maps


class WideResNet(nn.Module):
    """WRN-depth-widening, ``64 * widening`` features; WRN-16-1 has 175,066 weights.

    Source:
        Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146.
    """

    def __init__(self, depth: int, widening: int, *, classes: int):
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16, 16 * widening, 32 * widening, 64 * widening]
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = WideGroup(widths[0], widths[1], blocks=blocks, stride=1)
        self.block2 = WideGroup(widths[1], widths[2], blocks=blocks, stride=2)
        self.block3 = WideGroup(widths[2], widths[3], blocks=blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU()  # a layer, so that hooks see what it yields
        self.fc = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(n, classes)``."""
        x = self.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _wide(depth: int, widening: int) -> Callable[[int], nn.Module]:
    return lambda classes: WideResNet(depth, widening, classes=classes)


SMALL_NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda classes: small_resnet("resnet18", classes=classes),
    "resnet34": lambda classes: small_resnet("resnet34", classes=classes),
    "resnet50": lambda classes: small_resnet("resnet50", classes=classes),
    "preact_resnet18": lambda classes: PreActResNet18(classes=classes),
    "wrn16_1": _wide(16, 1),
    "wrn16_2": _wide(16, 2),
    "wrn28_10": _wide(28, 10),
    "wrn40_2": _wide(40, 2),
}


def initialize(network: nn.Module, *, generator: torch.Generator) -> None:
    """Draw weights anew: He's normal for convolutions, normal for linear layers, no biases.

    Batch norms begin again, too; what is none of these, as tokens and layer norms, stays.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
