"""From the name of a network and a checkpoint to a ``Backbone``: images in [0, 1] to features.

A network is always built untrained and nothing is ever downloaded; the weights come from the
checkpoint. The four kinds of names are listed at ``build``.
"""

import difflib
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision  # type: ignore[import-untyped]  # it ships no types
from timm.layers.classifier import ClassifierHead
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unbackdoor.checkpoint import Checkpoint, read_checkpoint, sha256_of
from unbackdoor.errors import ArchitectureError, CheckpointError, MismatchError, SettingsError
from unbackdoor.matching import (
    Match,
    describe_match,
    match_keys,
    matched_tensors,
    memory_of,
    without_head,
    wrapper_of,
)
from unbackdoor.networks import SMALL_NETWORKS
from unbackdoor.settings import in_range
from unbackdoor.types import Features, Images, Say

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
LARGEST_SIDE = 4096  # pixels; a config from elsewhere shall not ask for all memory
LARGEST_KERNEL = 32 * 32  # weights; of a layer that cuts images into patches
HEAD_NAME = re.compile(r"fc|linear|head|heads\.\w+|classifier(\.\d+)?")


class Backbone(nn.Module):
    """A network that takes images in [0, 1] and returns their features; normalization is inside.

    The network is taken over, not copied: its heads are moved out of ``body`` into ``heads``, and
    an identity stands in their place.

    Args:
        network: Maps normalized images to features, to logits if it has heads.
        heads: Dotted names of the modules inside ``network`` whose removal leaves features. Most
            networks have one, distilled transformers two, others none.
        mean: Of the pixels, one number per channel, on the [0, 1] scale.
        std: Likewise.

    Attributes:
        body: The network without its heads.
        heads: The heads, in the order of ``head_names``; empty if there are none.
        head_names: Where in ``body`` the heads belong.

    Raises:
        SettingsError: If ``mean`` or ``std`` lies outside [0, 1] or they differ in length.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        heads: tuple[str, ...] = (),
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        _check_normalization(mean, std)
        self.head_names = heads
        self.heads = nn.ModuleList(network.get_submodule(name) for name in heads)
        self.body = network
        self._remove_heads()
        for name, values in (("mean", mean), ("std", std)):
            row = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, row, persistent=False)

    def forward(self, images: Images) -> Features:
        """Return pooled features, shape ``(n, d)``, of images in [0, 1].

        Raises:
            ArchitectureError: If the network returns anything but ``(n, d)`` or ``(n, d, h, w)``.
        """
        features = self.body((images - self.mean) / self.std)
        if not isinstance(features, Tensor):
            kind = type(features).__name__
            raise ArchitectureError(f"the network returns a {kind}, not one tensor of features")
        if features.ndim == 4:
            features = features.mean((2, 3))
        if features.ndim != 2:
            shape = tuple(features.shape)
            raise ArchitectureError(f"features are (n, d) or (n, d, h, w), the network's: {shape}")
        return features

    def logits(self, images: Images) -> Tensor:
        """Return exactly what the whole network says of images in [0, 1], shape ``(n, classes)``.

        Raises:
            ArchitectureError: If the network has no head.
        """
        self._check_heads()
        for name, head in zip(self.head_names, self.heads, strict=True):
            self.body.set_submodule(name, head)
        try:
            logits: Tensor = self.body((images - self.mean) / self.std)
        finally:
            self._remove_heads()
        return logits

    def classify(self, features: Features) -> Tensor:
        """Return the logits of features that are at hand already, shape ``(n, classes)``.

        Raises:
            ArchitectureError: If the network has no head, or its logits are no linear map of its
                pooled features, so that only ``logits`` can tell them.
        """
        self._check_heads()
        if len(self.heads) > 1 or not isinstance(self.heads[0], nn.Linear):
            names = ", ".join(self.head_names)
            raise ArchitectureError(f"the head ({names}) is not one linear layer; call logits")
        logits: Tensor = self.heads[0](features)
        return logits

    def _remove_heads(self) -> None:
        for name in self.head_names:
            self.body.set_submodule(name, nn.Identity())

    def _check_heads(self) -> None:
        if not self.heads:
            raise ArchitectureError("the backbone has no head and so no logits; train a probe")


class Classifier(nn.Module):
    """A backbone with its heads, as one module from images in [0, 1] to logits."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Images) -> Tensor:
        """Return logits, shape ``(n, classes)``."""
        return self.backbone.logits(images)


class Pixels(NamedTuple):
    """Which images a network takes: mean and deviation per channel, and the side in pixels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int


class Architecture(NamedTuple):
    """An untrained network and what is known about it; ``None`` is unknown.

    Attributes:
        network: Maps normalized images to logits, or to features if it has no heads.
        heads: Dotted names of its heads.
        mean: Of the pixels that it expects, on the [0, 1] scale.
        std: Likewise.
        size: Side of the images that it expects, in pixels.
    """

    network: nn.Module
    heads: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: int | None


@dataclass(frozen=True)
class Source:
    """Which checkpoint to read, and how.

    Attributes:
        checkpoint: A file or a Hugging Face folder, see ``read_checkpoint``.
        arch: See ``build``.
        mean: Of the pixels, one number per channel, on the [0, 1] scale. By default the
            checkpoint's own (a Hugging Face ``config.json``), then the architecture's.
        std: Likewise.
        size: Side of the images in pixels; by default the architecture's.
        head: See ``build``.
        nesting: See ``match_keys``.
        prefix: See ``match_keys``.
    """

    checkpoint: Path
    arch: str
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: int | None = None
    head: str | None = None
    nesting: str | None = None
    prefix: str | None = None


class Loaded(NamedTuple):
    """A backbone and where it came from.

    Attributes:
        backbone: In eval mode, on the CPU.
        checkpoint: The file as read.
        match: Which of its tensors went where.
        size: Side of the images that the network expects, in pixels.
        dimension: Number of features.
    """

    backbone: Backbone
    checkpoint: Checkpoint
    match: Match
    size: int
    dimension: int


def load_backbone(
    checkpoint: str | Path,
    arch: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
    head: str | None = None,
    nesting: str | None = None,
    prefix: str | None = None,
) -> Backbone:
    """Return the backbone in ``checkpoint``, in eval mode, on the CPU.

    Args are the attributes of ``Source``, errors those of ``open_backbone``.
    """
    source = Source(Path(checkpoint), arch, mean, std, size, head, nesting, prefix)
    return open_backbone(source).backbone


def open_backbone(source: Source) -> Loaded:
    """Build the network, fill it with the checkpoint's tensors, and try it on two noise images.

    The checkpoint decides how many classes the head has, and whether there is one.

    Raises:
        UnsafeCheckpointError: See ``read_checkpoint``.
        CheckpointError: See ``read_checkpoint``; or if the weights yield no finite features.
        MismatchError: If tensors and architecture do not fit each other.
        ArchitectureError: If there is no such architecture, or it yields no feature vectors, or
            its normalization or image size is unknown and not given.
        SettingsError: If ``mean`` or ``std`` lies outside [0, 1] or they differ in length, or
            ``size`` is below 1 or such that two images do not fit into memory.
    """
    if source.size is not None and source.size < 1:
        raise SettingsError(f"size is in pixels, at least 1, got {source.size}")
    checkpoint, arch, head = read_checkpoint(source.checkpoint), source.arch, source.head
    architecture = build(arch)  # its own heads tell the classes, whatever head is asked for
    if head is not None:
        heads = (*architecture.heads, *_chosen_heads(architecture.network, head))
        architecture = architecture._replace(heads=tuple(dict.fromkeys(heads)))
    match = _match(checkpoint, arch, architecture, nesting=source.nesting, prefix=source.prefix)
    tensors = matched_tensors(checkpoint, match)
    weights = dict(architecture.network.named_parameters())
    for key, tensor in tensors.items():
        if tensor.is_complex():
            raise CheckpointError(
                f"{source.checkpoint}: {key} is of complex numbers, which no network has"
            )
        whole = not tensor.is_floating_point()
        if whole and key in weights and weights[key].is_floating_point():
            raise CheckpointError(
                f"{source.checkpoint}: {key} is of {tensor.dtype}; quantized weights are not "
                "supported, save them as floating-point ones"
            )
    whole_head = [k for k in architecture.network.state_dict() if _is_in(k, architecture.heads)]
    if head is None and match.head and not match.keys.keys() >= {*whole_head}:
        match = without_head(match)  # such as one without a bias, or of another width
        tensors = matched_tensors(checkpoint, match)
    classes = _count_classes(tensors, architecture.heads)
    known = _count_classes(architecture.network.state_dict(), architecture.heads)
    if head is not None or (classes and classes != known):
        architecture = build(arch, classes=classes, head=head)
    if head is not None:
        match = _match(checkpoint, arch, architecture, nesting=source.nesting, prefix=source.prefix)
        tensors = matched_tensors(checkpoint, match)
    heads = _fill(architecture, tensors, match, arch=arch)

    own = checkpoint.config.get("pretrained_cfg")
    own = own if isinstance(own, dict) else checkpoint.config  # older files hold it at the top
    pixels = settle_pixels(
        arch,
        architecture,
        mean=source.mean or _numbers(own.get("mean")),
        std=source.std or _numbers(own.get("std")),
        size=source.size or _side(own.get("input_size")),
    )
    backbone = Backbone(architecture.network, heads, mean=pixels.mean, std=pixels.std).eval()
    dimension = try_features(backbone, arch=arch, size=pixels.size)
    return Loaded(backbone, checkpoint, match, pixels.size, dimension)


def settle_pixels(
    arch: str,
    architecture: Architecture,
    *,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    size: int | None,
) -> Pixels:
    """Return which images a network takes: what is given, else what the architecture knows.

    Raises:
        ArchitectureError: If something is unknown and not given.
    """
    mean, std = mean or architecture.mean, std or architecture.std
    if size is None:
        size = architecture.size
    else:
        in_range("size", size, least=1)
    if mean is None or std is None or size is None:
        raise ArchitectureError(
            f"{arch} does not say which images it takes. Give its module the attributes mean, std "
            "(tuples on the [0, 1] scale) and size (pixels), or pass --mean, --std and --size; "
            "--mean 0 0 0 --std 1 1 1 means no normalization."
        )
    return Pixels(tuple(mean), tuple(std), size)


def describe_pixels(loaded: Loaded) -> dict[str, Any]:
    """Return which images a network takes, as a record holds it."""
    backbone = loaded.backbone
    mean, std = (each.flatten().tolist() for each in (backbone.mean, backbone.std))
    return {"mean": mean, "std": std, "size": loaded.size}


def describe_input(source: Source, loaded: Loaded, *, say: Say) -> None:
    """Say what the checkpoint is and which of its tensors are used."""
    named = loaded.checkpoint.config.get("architecture")
    asked = source.arch.removeprefix("timm/").partition(".")[0]
    if isinstance(named, str) and not is_own(source.arch) and named.partition(".")[0] != asked:
        say(f"warning: its config.json names the architecture {named!r}, not {source.arch!r}")
    say(f"{source.checkpoint}: {loaded.checkpoint.kind}, sha256 {loaded.checkpoint.sha256[:16]}")
    say(describe_match(loaded.match, loaded.checkpoint))
    pixels = (loaded.backbone.mean, loaded.backbone.std)
    mean, std = (", ".join(f"{value:.4g}" for value in each.flatten().tolist()) for each in pixels)
    say(f"{source.arch}: {loaded.dimension} features; pixels less mean {mean}, over std {std}")


def describe_network(source: Source, loaded: Loaded) -> dict[str, str]:
    """Return what makes a checkpoint's tensors this network, for the state of a run."""
    match, backbone = loaded.match, loaded.backbone
    return {
        "arch": source.arch,
        "code": own_hash(source.arch),
        "place": ".".join((*match.nesting, match.prefix)),
        "head": ", ".join(backbone.head_names),
        "mean": str(backbone.mean.flatten().tolist()),
        "std": str(backbone.std.flatten().tolist()),
        "size": str(loaded.size),
    }


def network_state(backbone: Backbone) -> dict[str, Tensor]:
    """Return all tensors of body and heads under the network's own keys, sharing their memory."""
    state: dict[str, Tensor] = backbone.body.state_dict()
    for name, head in zip(backbone.head_names, backbone.heads, strict=True):
        state |= head.state_dict(prefix=f"{name}.")
    return state


def public_name(arch: str) -> str:
    """Return an architecture's name as a record may hold it: no folder of a user's own file."""
    return arch.rpartition("/")[2] if is_own(arch) else arch


def is_own(name: str) -> bool:
    """Tell whether a network or a defense is a function in a file, ``path/to/file.py:function``."""
    return name.rpartition(":")[0].endswith(".py")


def own_hash(name: str) -> str:
    """Return the SHA-256 of the file that holds a network or a defense; nothing if none does."""
    file = Path(name.rpartition(":")[0])
    return sha256_of(file) if is_own(name) and file.is_file() else ""


def build(arch: str, *, classes: int | None = None, head: str | None = None) -> Architecture:
    """Return the untrained network that ``arch`` names.

    Args:
        arch: A timm name, with or without its tag (``resnet18``, ``vit_tiny_patch16_224``);
            ``torchvision/NAME`` for torchvision's classification networks; ``cifar/NAME`` for
            those of ``networks.SMALL_NETWORKS``; ``path/to/file.py:function`` for the user's own.
            That file is run. The function takes nothing, or ``classes`` (or ``num_classes``), and
            returns a module from images to features or logits, which may tell by attributes
            ``mean``, ``std`` and ``size`` which images it takes.
        classes: Outputs of the head; by default the architecture's own number.
        head: Dotted name of the head, ``"none"`` if there is none. By default timm says which
            modules it is; elsewhere it is the last linear layer or 1×1 convolution, provided that
            its name is ``fc``, ``linear``, ``head``, ``heads.*``, ``classifier`` or
            ``classifier.N``. Any other last layer is taken for a part of the backbone.

    Raises:
        ArchitectureError: If there is no such network or head, or the user's file fails.
    """
    file, _, function = arch.rpartition(":")
    library, _, name = arch.rpartition("/")
    if arch.endswith(".py"):
        raise ArchitectureError(f"{arch}: name the function that builds it, {arch}:FUNCTION")
    if is_own(arch):
        architecture = _build_own(Path(file), function, classes)
    elif library == "torchvision" and name in _torchvision_names():
        architecture = _build_torchvision(name, classes or 1000)
    elif library == "cifar" and name in SMALL_NETWORKS:
        network = SMALL_NETWORKS[name](classes or 10)
        heads = _find_heads(network)
        architecture = Architecture(network, heads, CIFAR10_MEAN, CIFAR10_STD, 32)
    elif library in ("", "timm") and timm.is_model(name.partition(".")[0]):
        architecture = _build_timm(name, classes)
    else:
        others = [f"torchvision/{name}" for name in _torchvision_names()]
        others += [f"cifar/{name}" for name in SMALL_NETWORKS]
        raise _unknown(arch, timm.list_models() + others)
    if head is None:
        return architecture
    return architecture._replace(heads=_chosen_heads(architecture.network, head))


def _build_timm(name: str, classes: int | None) -> Architecture:
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # timm's word for a tag that it does not know
        raise _unknown(name, timm.list_pretrained(f"{name.partition('.')[0]}.*")) from error
    # timm counts 0 classes for self-supervised weights; a fine-tuned checkpoint may have a head
    classes = classes or (config and config.num_classes) or 1000
    network: Any = timm.create_model(name, pretrained=False, num_classes=classes)
    found = network.get_classifier()
    modules = found if isinstance(found, tuple | list) else [found]
    # a ClassifierHead pools, and pools right where features come as (n, h, w, d)
    layers = [module.fc if isinstance(module, ClassifierHead) else module for module in modules]
    heads = tuple(name for name, module in network.named_modules() if module in layers)
    own = network.pretrained_cfg
    return Architecture(network, heads, own["mean"], own["std"], own["input_size"][-1])


def _build_torchvision(name: str, classes: int) -> Architecture:
    if name.startswith("mnasnet"):
        raise ArchitectureError(
            f"torchvision/{name}: loads only what says which version it is of, which no file of "
            "tensors does; timm's mnasnet_100 has files of its own"
        )
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    mean, std, size = transforms.mean, transforms.std, transforms.crop_size[0]
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # the auxiliary heads serve training from scratch; init_weights would be slow, then lost
        options = {"aux_logits": False, "init_weights": False}
        mean = std = (0.5, 0.5, 0.5)  # the published weights renormalize to this inside
    network = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
    size = getattr(network, "image_size", size)  # vit_h_14 is built for 224, published for 518
    return Architecture(network, _find_heads(network), tuple(mean), tuple(std), size)


def _build_own(path: Path, name: str, classes: int | None) -> Architecture:
    function = import_function(path, name)
    parameters = inspect.signature(function).parameters
    keyword = next((word for word in ("classes", "num_classes") if word in parameters), None)
    arguments = {}
    if keyword and (classes or parameters[keyword].default is inspect.Parameter.empty):
        arguments[keyword] = classes or 1000
    try:
        network = function(**arguments)
    except Exception as error:
        raise ArchitectureError(f"{path}:{name} fails: {_in_short(error)}") from error
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise ArchitectureError(f"{path}:{name} returns a {kind}, not a torch.nn.Module")
    for key, value in network.state_dict().items():
        if is_lazy(value):
            raise ArchitectureError(
                f"{path}:{name} returns a network whose {key} has no shape yet; run it once on an "
                "image before it is returned"
            )
        if not isinstance(value, Tensor):
            raise ArchitectureError(
                f"{path}:{name} returns a network whose {key} is a {type(value).__name__} and no "
                "tensor, which is not supported"
            )
    # a tensor ``mean`` is not taken: it serves a network that normalizes by itself
    mean, std = _numbers(getattr(network, "mean", None)), _numbers(getattr(network, "std", None))
    size = getattr(network, "size", None)
    size = size if isinstance(size, int) else None
    return Architecture(network, _find_heads(network), mean, std, size)


def import_function(path: Path, name: str, *, flag: str = "--arch") -> Callable[..., object]:
    """Run the user's own file and return the function ``name`` of it.

    Args:
        flag: What takes such a file, for the message.

    Raises:
        ArchitectureError: If there is no such file or function, or the file fails.
    """
    # Two files may have one name; annotations are looked up in the module of that name.
    place = hashlib.sha256(bytes(path.resolve())).hexdigest()
    spec = importlib.util.spec_from_file_location(f"unbackdoor_own_{place}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ArchitectureError(f"{path}: no such file; {flag} takes path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it is imported
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        hint = "Is the folder of what it imports in PYTHONPATH?"
        raise ArchitectureError(f"{path} fails: {_in_short(error)}. {hint}") from error
    except (Exception, SystemExit) as error:
        raise ArchitectureError(f"{path} fails: {_in_short(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ArchitectureError(f"{path} has no function {name!r}; it has {', '.join(own) or None}")
    return function  # type: ignore[no-any-return]  # whatever the user's file holds


def _find_heads(network: nn.Module) -> tuple[str, ...]:
    layers = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    wrapper = wrapper_of(network.state_dict())  # a network that only wraps another has net.fc
    return tuple(name for name in layers[-1:] if HEAD_NAME.fullmatch(name.removeprefix(wrapper)))


def _chosen_heads(network: nn.Module, head: str) -> tuple[str, ...]:
    if head == "none":
        return ()
    names = [name for name, _ in network.named_modules() if name]
    if head not in names:
        nearest = difflib.get_close_matches(head, names) or names[-3:]
        raise ArchitectureError(f"the network has no module {head!r}; it has {', '.join(nearest)}")
    return (head,)


def _match(
    source: Checkpoint,
    arch: str,
    architecture: Architecture,
    *,
    nesting: str | None,
    prefix: str | None,
) -> Match:
    expected = {key: value.shape for key, value in architecture.network.state_dict().items()}
    head = tuple(key for key in expected if _is_in(key, architecture.heads))
    rename = partial(_timm_names, architecture.network)
    try:
        return match_keys(
            source, expected, head=head, nesting=nesting, prefix=prefix, rename=rename
        )
    except MismatchError as error:
        named = source.config.get("architecture")
        if named is None or named == arch:
            raise
        hint = f"The checkpoint's config.json names the architecture {named!r}, --arch {arch!r}."
        raise MismatchError(f"{error}\n{hint}") from error


def _timm_names(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return which of ``tensors`` timm would load under which key, where it changes only names.

    timm converts the published files of many papers on loading. What it reshapes or resamples is
    left out, for that could not be written back under the file's own keys.
    """
    module = sys.modules[type(network).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None or not module.__name__.startswith("timm.models."):
        return {}
    known = {value.shape for value in network.state_dict().values()}
    if any(
        tensor.ndim == 4 and tensor.shape[2:].numel() > LARGEST_KERNEL and tensor.shape not in known
        for tensor in tensors.values()
    ):
        return {}  # timm would resample it, in memory that grows with the kernel's square
    try:
        stand_ins = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        converted = convert(dict(stand_ins), network)
        places = {key: memory_of(value) for key, value in converted.items()}
    except Exception:  # whatever a file that is not of this family makes it stumble on
        return {}
    names = {
        memory_of(stand_in): name
        for name, stand_in in stand_ins.items()
        if stand_in._version == 0  # else its values were changed in place
    }
    found = {key: names.get(place) for key, place in places.items()}
    return {key: name for key, name in found.items() if name is not None}


def _count_classes(state: dict[str, Tensor], heads: Iterable[str]) -> int | None:
    """Return the rows of the last head's last matrix; ``None`` if ``state`` has no head."""
    rows = [len(value) for key, value in state.items() if _is_in(key, heads) and value.ndim > 1]
    return rows[-1] if rows else None


def _fill(
    architecture: Architecture, tensors: dict[str, Tensor], match: Match, *, arch: str
) -> tuple[str, ...]:
    """Copy ``tensors`` into the network; return its heads, none if ``tensors`` lack them."""
    network, heads = architecture.network, architecture.heads
    if not match.head:
        for name in heads:
            network.set_submodule(name, nn.Identity())
        heads = ()
    try:
        missing = network.load_state_dict(tensors, strict=False).missing_keys
    except RuntimeError as error:
        raise MismatchError(f"the checkpoint does not fit {arch}: {error}") from error
    absent = ", ".join(key for key in missing if key not in match.missing)
    if absent:
        raise MismatchError(f"the checkpoint has a part of the head of {arch}, but no {absent}")
    return heads


def try_features(backbone: Backbone, *, arch: str, size: int) -> int:
    """Return the number of features of two noise images, or raise what is wrong with them.

    Raises:
        ArchitectureError: If the network fails on images of this size, or its features cannot tell
            images apart.
        CheckpointError: If they are NaN or infinite.
        SettingsError: If two such images do not fit into memory.
    """
    images = _noise(size)
    try:
        with torch.no_grad():
            features = backbone(images)
    except Exception as error:  # the user's own network may raise anything
        part = f"{arch} without {', '.join(backbone.head_names)}" if backbone.heads else arch
        cause = f"fails on {size}-pixel RGB images: {_in_short(error)}"
        if backbone.heads and _has_logits(backbone, images):
            cause += ". With its head it works; --head none takes the logits for features."
        raise ArchitectureError(f"{part} {cause}") from error
    if not features.isfinite().all():
        broken = [key for key, t in network_state(backbone).items() if not t.isfinite().all()]
        where = f": there are such values in {', '.join(broken[:3])}" if broken else ""
        raise CheckpointError(f"{arch} with these weights yields NaN or infinite features{where}")
    if len(features) != 2 or features.shape[1] < 2 or features[0].equal(features[1]):
        shape = tuple(features.shape)
        raise ArchitectureError(f"{arch} yields no usable features: shape {shape}, or all alike")
    return int(features.shape[1])


def try_logits(backbone: Backbone, *, arch: str, size: int) -> int:
    """Return the number of classes that the heads of a backbone tell apart.

    Raises:
        ArchitectureError: If it fails with them on images of this size, or yields something else.
        SettingsError: If two such images do not fit into memory.
    """
    images = _noise(size)
    try:
        with torch.no_grad():
            logits = backbone.logits(images)
    except Exception as error:  # as in try_features
        cause = f"fails on {size}-pixel RGB images: {_in_short(error)}"
        raise ArchitectureError(f"{arch} with {', '.join(backbone.head_names)} {cause}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ArchitectureError(f"{arch} yields no logits (n, classes), but {_kind_of(logits)}")
    return int(logits.shape[1])


def _noise(size: int) -> Images:
    try:
        return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    except (RuntimeError, TypeError) as error:  # of more bytes than there are, or can be counted
        raise SettingsError(
            f"two images of {size} × {size} pixels do not fit into memory; pass a smaller --size"
        ) from error


def _kind_of(output: object) -> str:
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__


def _has_logits(backbone: Backbone, images: Images) -> bool:
    try:
        with torch.no_grad():
            backbone.logits(images)
    except Exception:  # as in try_features
        return False
    return True


def _check_normalization(mean: Sequence[float], std: Sequence[float]) -> None:
    for name, values in (("mean", mean), ("std", std)):
        for value in values:
            if not (isinstance(value, int | float) and 0 <= value <= 1):
                raise SettingsError(
                    f"{name} is on the [0, 1] scale, got {value}; divide values for 0..255 by 255"
                )
    if 0 in std:
        raise SettingsError("std must be positive, got 0")
    if len(mean) != len(std):
        raise SettingsError(f"mean has {len(mean)} channels but std has {len(std)}")


def _torchvision_names() -> list[str]:
    return list(torchvision.models.list_models(module=torchvision.models))


def _unknown(arch: str, names: list[str]) -> ArchitectureError:
    nearest = difflib.get_close_matches(arch, names, n=1)
    hint = "pass a timm name, torchvision/NAME, cifar/NAME or path/to/file.py:function"
    if nearest:
        hint = f"did you mean {nearest[0]!r}?"
    return ArchitectureError(f"arch {arch!r} is unknown; {hint}")


def _numbers(value: object) -> tuple[float, ...] | None:
    return tuple(value) if isinstance(value, tuple | list) else None


def _side(size: object) -> int | None:
    """Return the side of square images, of channels, height and width as timm's configs have."""
    match size:
        case [_, int(height), int(width)] if 0 < height == width <= LARGEST_SIDE:
            return height
    return None


def _is_in(key: str, modules: Iterable[str]) -> bool:
    return any(key.startswith(f"{name}.") for name in modules)


def _in_short(error: BaseException) -> str:
    line = str(error).partition("\n")[0]
    return line if isinstance(error, ArchitectureError) else f"{type(error).__name__}: {line}"
