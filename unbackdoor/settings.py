"""Every setting a user can pass, as frozen dataclasses; imports no torch, so that help is instant.

The dataclasses' field names are the names everywhere: ``search.epsilon`` in Python is
``--search.epsilon`` on the command line and ``epsilon`` in the table ``[search]`` of a TOML file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from cyclopts import Parameter, Token

from unbackdoor.errors import DataError, SettingsError, unknown


def _ratio(_: type, tokens: Sequence[Token]) -> float:
    """Read a number or a ratio of two, as ``8/255``, from a flag or a TOML string."""
    above, slash, below = tokens[0].value.partition("/")
    if slash and float(below) == 0:
        raise ValueError(f"{tokens[0].value} divides by zero")
    return float(above) / float(below) if slash else float(above)


def _whole(_: type, tokens: Sequence[Token]) -> int:
    """Read a whole number; cyclopts alone would round a fraction without a word."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not a whole number") from None


Ratio = Annotated[float, Parameter(converter=_ratio)]
Whole = Annotated[int, Parameter(converter=_whole)]
DeviceName: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]
PrecisionName: TypeAlias = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class ViewSettings:
    """How a random view of an image is drawn.

    Attributes:
        min_area: Smallest crop, as a share of the image's area.
        flip: Probability of a mirror image.
        jitter: Strength of the colour jitter, SimCLR's s; 0 is off.
        jitter_probability: Share of the views whose colours are jittered.
        grey: Share of the views that lose their colours.
        blur: Share of the views that are blurred.
    """

    min_area: float = 0.2
    flip: float = 0.5
    jitter: float = 0.5
    jitter_probability: float = 0.8
    grey: float = 0.2
    blur: float = 0.0

    def __post_init__(self) -> None:
        in_range("views.min_area", self.min_area, above=0, most=1)
        for name in ("flip", "jitter_probability", "grey", "blur"):
            in_range(f"views.{name}", getattr(self, name), least=0, most=1)
        in_range("views.jitter", self.jitter, least=0)


@dataclass(frozen=True)
class SearchSettings:
    """How images with backdoor-like features are searched for.

    Attributes:
        kind: ``image``: in a ball around each view, every image on its own, as in the paper;
            ``batch``: one perturbation in that ball for all images of a batch; ``changes``: small
            changes of all images, for which ``changes`` counts and nothing below.
        norm: Of the ball: every pixel within epsilon, or the whole image.
        epsilon: Radius on the [0, 1] scale: 8/255 is 8 grey levels. For L2, 1024/255 is the paper's
            1024.
        steps: Gradient steps.
        step_size: Length of a step, in units of ``step_unit``.
        step_unit: Radii of the ball, the [0, 1] scale, or grey levels.
        start: At a random place in the ball, or at its centre.
        batch_norm: Normalize by the running statistics, or by those of the batch.
    """

    kind: Literal["image", "batch", "changes"] = "changes"
    norm: Literal["linf", "l2"] = "linf"
    epsilon: Ratio = 8 / 255
    steps: Whole = 20
    step_size: float = 0.1
    step_unit: Literal["epsilon", "pixel", "level"] = "epsilon"
    start: Literal["random", "zero"] = "random"
    batch_norm: Literal["running", "batch"] = "running"

    def __post_init__(self) -> None:
        if self.norm == "linf" and not 0 <= self.epsilon <= 1:
            raise SettingsError(
                f"search.epsilon is on the [0, 1] scale, got {self.epsilon}; "
                "for 8 grey levels pass 8/255"
            )
        in_range("search.epsilon", self.epsilon, least=0)
        in_range("search.steps", self.steps, least=0)
        in_range("search.step_size", self.step_size, least=0)


@dataclass(frozen=True)
class ChangeSettings:
    """Which changes of all images are learned, where ``search.kind`` is ``changes``.

    They are drawn anew at the start of every epoch and raise the concentration of the whitened
    features.

    Attributes:
        patches: How many patches, each in a window of random place and size.
        patch_min: Smallest side of a window, as a share of the image's shorter side.
        patch_max: Largest side, likewise.
        additions: How many faint images that are added to every image.
        amplitude: Largest root mean square of one, on the [0, 1] scale.
        fade: Each fades the image towards a random grey first, by a random share up to this one.
        warps: How many smooth warps.
        pixels: Largest move of a warp, in pixels.
        steps: Gradient steps at the start of an epoch, on random images; one more comes with each
            batch.
        group: Images for each change in such a step.
        rate: Of Adam.
        shrinkage: Of the whitening, see ``changes.Whitening``.
    """

    patches: Whole = 5
    patch_min: float = 0.09
    patch_max: float = 0.19
    additions: Whole = 3
    amplitude: Ratio = 7 / 255
    fade: float = 0.3
    warps: Whole = 6
    pixels: float = 0.3
    steps: Whole = 40
    group: Whole = 16
    rate: float = 0.1
    shrinkage: float = 0.1

    def __post_init__(self) -> None:
        in_range("changes.steps", self.steps, least=0)
        in_range("changes.patch_min", self.patch_min, above=0, most=1)
        in_range("changes.patch_max", self.patch_max, least=self.patch_min, most=1)
        for name in ("patches", "additions", "warps"):
            in_range(f"changes.{name}", getattr(self, name), least=0)
        in_range("changes.amplitude", self.amplitude, above=0, most=1)
        in_range("changes.fade", self.fade, least=0, most=1)
        in_range("changes.pixels", self.pixels, above=0, most=16)
        in_range("changes.group", self.group, least=2)
        in_range("changes.shrinkage", self.shrinkage, above=0)
        in_range("changes.rate", self.rate, above=0)
        if self.count == 0:
            raise SettingsError(
                "changes.patches, changes.additions and changes.warps are all 0; ask for one change"
            )

    @property
    def count(self) -> int:
        """Of all changes."""
        return self.patches + self.additions + self.warps


@dataclass(frozen=True)
class ProjectionSettings:
    """A projection head between features and losses, trained first on the same images.

    Attributes:
        width: Of the projected features; 0 is no projection head.
        epochs: Passes of its training, with the backbone frozen.
        learning_rate: Of its training.
    """

    width: Whole = 0
    epochs: Whole = 10
    learning_rate: float = 0.05

    def __post_init__(self) -> None:
        in_range("projection.width", self.width, least=0)
        in_range("projection.epochs", self.epochs, least=1)
        in_range("projection.learning_rate", self.learning_rate, above=0)


@dataclass(frozen=True)
class PurifySettings:
    """How a backbone is purified; ``pull + distill + align`` is 1.

    Attributes:
        pull: Weight of the term that brings the found images back to their clean anchor.
        distill: Weight of the term that keeps the original's features of clean images.
        align: Weight of the term that keeps two clean views of an image together.
        loss: How features are compared. ``squared``: mean squared distance, in variances of the
            original's features; ``contrastive``: NT-Xent, as in the paper.
        anchor: Where found images are brought back to. ``original``: the original's features of
            the same view, before the search; ``view``: the tuned features of another view, as in
            the paper.
        trim: Images of a batch are left out of the squared distances where their plain features
            have moved further from the original's than most: by more than this times the median
            squared distance. It frees images that carry the trigger. 0 leaves none out.
        temperature: Of the contrastive loss.
        epochs: Passes over the images.
        batch_size: Images a step.
        last_batch: What becomes of a last, smaller batch.
        learning_rate: Of SGD.
        momentum: Of SGD.
        weight_decay: L2 penalty.
        clip: Largest norm of all gradients together; longer ones are scaled down. 0 is no limit.
        schedule: How the learning rate falls over the whole run.
        batch_norm: What normalizes while tuning. ``batch``: every view's own batch statistics;
            ``joint``: those of all views together; ``frozen``: the original's running statistics;
            ``reference``: running statistics that follow the tuned weights on plain images, which
            are then the anchor; gradients pass through the plain images' mean and variance.
        seed: Of batch order, views and starts of the search.
        search: See :class:`SearchSettings`.
        changes: See :class:`ChangeSettings`.
        views: See :class:`ViewSettings`.
        projection: See :class:`ProjectionSettings`.
    """

    pull: float = 0.8
    distill: float = 0.2
    align: float = 0.0
    loss: Literal["squared", "contrastive"] = "squared"
    anchor: Literal["original", "view"] = "original"
    trim: float = 0.0
    temperature: float = 0.5
    epochs: Whole = 6
    batch_size: Whole = 64
    last_batch: Literal["drop", "keep"] = "drop"
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 1.0
    schedule: Literal["constant", "cosine"] = "cosine"
    batch_norm: Literal["batch", "joint", "frozen", "reference"] = "reference"
    seed: Whole = 0
    search: SearchSettings = field(default_factory=SearchSettings)
    changes: ChangeSettings = field(default_factory=ChangeSettings)
    views: ViewSettings = field(default_factory=lambda: ViewSettings(0.9, jitter=0.0, grey=0.0))
    projection: ProjectionSettings = field(default_factory=ProjectionSettings)

    def __post_init__(self) -> None:
        for name in ("pull", "distill", "align", "momentum", "weight_decay", "clip"):
            in_range(name, getattr(self, name), least=0)
        for name in ("temperature", "learning_rate"):
            in_range(name, getattr(self, name), above=0)
        check_seed(self.seed)
        in_range("epochs", self.epochs, least=1)
        in_range("batch_size", self.batch_size, least=2)
        total = self.pull + self.distill + self.align
        if abs(total - 1) > 1e-6:
            raise SettingsError(
                f"pull + distill + align must be 1, got {self.pull} + {self.distill} + "
                f"{self.align} = {total:g}"
            )
        in_range("trim", self.trim, least=0)
        if 0 < self.trim < 1:
            raise SettingsError(
                f"trim {self.trim:g} would leave out most images; pass 1 or more, or 0 for none"
            )
        if self.trim > 0 and self.loss == "contrastive":
            raise SettingsError(
                f"trim {self.trim:g}: the contrastive loss compares each image with all others and "
                "leaves none out; pass --trim 0"
            )
        if self.learns_changes and self.batch_size < self.changes.count:
            raise SettingsError(
                f"batch_size {self.batch_size} is less than one image for each of "
                f"{self.changes.count} changes; pass --batch-size {self.changes.count} or more, or "
                "fewer --changes.patches"
            )

    @property
    def learns_changes(self) -> bool:
        """Whether changes of all images are learned, once an epoch."""
        return self.search.kind == "changes" and self.pull > 0


# Differences from the defaults above. All but the first are the paper's own settings; where it is
# silent, they take the most common reading: batch norm in training mode, every view in a pass of
# its own.
_CIFAR10: Mapping[str, Any] = {
    "pull": 0.3,
    "distill": 0.5,
    "align": 0.2,
    "loss": "contrastive",
    "anchor": "view",
    "epochs": 15,
    "batch_size": 128,
    "clip": 0.0,
    "schedule": "constant",
    "batch_norm": "batch",
    "search": {"kind": "image"},
    "views": {"min_area": 0.2, "jitter": 0.5, "grey": 0.2},
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "cifar10": _CIFAR10,
    "cifar10-simclr": {**_CIFAR10, "search": {"kind": "image", "steps": 100}},
    "imagenet100": {
        **_CIFAR10,
        "distill": 0.7,
        "align": 0.0,
        "learning_rate": 0.05,
        "search": {"kind": "image", "epsilon": 16 / 255},
        "views": {"min_area": 0.2, "jitter": 0.5, "grey": 0.2, "blur": 0.5},
    },
}


def purify_preset(name: str) -> PurifySettings:
    """Return the settings that the preset ``name`` stands for.

    Raises:
        SettingsError: If there is no such preset.
    """
    if name not in PRESETS:
        raise SettingsError(unknown("preset", name, PRESETS))
    defaults = PurifySettings()
    values = {
        key: replace(getattr(defaults, key), **value) if isinstance(value, Mapping) else value
        for key, value in PRESETS[name].items()
    }
    return replace(defaults, **values)


@dataclass(frozen=True)
class VictimSettings:
    """How a victim is trained, from new weights; SGD's and LARS's momentum is 0.9.

    The rate rises over ``warmup`` epochs and then falls to 0 along a cosine.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step; a last, smaller batch is dropped.
        optimizer: SGD, or LARS, which scales every layer's step to its weights.
        learning_rate: The highest.
        warmup: Epochs in which the rate rises.
        weight_decay: L2 penalty.
        augment: ``shift``: random crop after padding by ``margin``, and mirror images; ``views``:
            as ``views`` says; ``none``. SimCLR always has views.
        margin: Pixels of that padding.
        views: See :class:`ViewSettings`.
        temperature: Of SimCLR's loss.
        projection: Width of SimCLR's projected features; its head is dropped afterwards.
        limit: Train on this many of the images, drawn by the seed; 0 is all.
        channels_last: Memory layout of images and weights, where PyTorch can train the network in
            it; on a CPU it halves the time.
        seed: Of weights, order, augmentation and poisoned rows.
    """

    epochs: Whole = 200
    batch_size: Whole = 128
    optimizer: Literal["sgd", "lars"] = "sgd"
    learning_rate: float = 0.1
    warmup: Whole = 0
    weight_decay: float = 5e-4
    augment: Literal["shift", "views", "none"] = "shift"
    margin: Whole = 4
    views: ViewSettings = field(default_factory=ViewSettings)
    temperature: float = 0.5
    projection: Whole = 128
    limit: Whole = 0
    channels_last: bool = True
    seed: Whole = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "margin", "projection"):
            in_range(name, getattr(self, name), least=1)
        for name in ("learning_rate", "temperature"):
            in_range(name, getattr(self, name), above=0)
        for name in ("warmup", "weight_decay", "limit"):
            in_range(name, getattr(self, name), least=0)
        in_range("batch_size", self.batch_size, least=2)
        check_seed(self.seed)


# How victims are trained, as differences from the defaults above. The paper gives epochs and which
# attacks go without blur or augmentation; the rest is SimCLR's own for CIFAR-10 (1.0 for each 256
# images of a batch) and ImageNet, or common practice. ``cpu`` is for small networks on two cores.
_SIMCLR_VIEWS = {"min_area": 0.08, "jitter": 0.5, "grey": 0.2, "blur": 0.5}
_CROPS = {"min_area": 0.08, "jitter": 0.0, "grey": 0.0}
VICTIM_PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "supervised": {
        "paper": {},
        "cpu": {"epochs": 12},
        "imagenet100": {
            "epochs": 90,
            "batch_size": 256,
            "weight_decay": 1e-4,
            "augment": "views",
            "views": _CROPS,
        },
    },
    "simclr": {
        "paper": {
            "epochs": 1000,
            "batch_size": 512,
            "optimizer": "lars",
            "learning_rate": 2.0,
            "warmup": 10,
            "weight_decay": 1e-6,
            "augment": "views",
            "views": _SIMCLR_VIEWS,
        },
        "cpu": {
            "epochs": 20,
            "learning_rate": 0.2,
            "warmup": 1,
            "weight_decay": 1e-4,
            "augment": "views",
            "views": _SIMCLR_VIEWS,
            "limit": 10_000,
        },
        "imagenet100": {
            "epochs": 400,
            "batch_size": 256,
            "optimizer": "lars",
            "learning_rate": 0.3,
            "warmup": 10,
            "weight_decay": 1e-6,
            "augment": "views",
            "views": {**_SIMCLR_VIEWS, "jitter": 1.0},
            "temperature": 0.1,
        },
    },
}


def victim_preset(name: str, *, training: str, attack: str) -> dict[str, Any]:
    """Return what the preset ``name`` sets for a victim, with what the paper says of its attack.

    CLA's victims are trained without augmentation, Blend's SimCLR victims without blur. WaNet's
    train five times as long in ``cpu``: after 12 epochs it has half of its success.

    Raises:
        SettingsError: If there is no such preset.
    """
    presets = VICTIM_PRESETS[training]
    if name not in presets:
        raise SettingsError(unknown("preset", name, presets))
    preset = dict(presets[name])
    if attack == "cla" and training == "supervised":
        preset["augment"] = "none"
    if (attack, training, name) == ("wanet", "supervised", "cpu"):
        preset["epochs"] = 60
    if attack == "blend" and training == "simclr":
        preset["views"] = {**preset["views"], "blur": 0.0}
    return preset


@dataclass(frozen=True)
class DetectionSettings:
    """How a Faster R-CNN is trained on a backbone; SGD's momentum is 0.9.

    The backbone's stem and first stage are frozen, and so is all batch norm. The rate rises over
    ``warmup`` steps and falls to a tenth after 3/4 and again after 11/12 of all steps.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step; a last, smaller batch is kept.
        learning_rate: The highest.
        warmup: Steps in which the rate rises.
        weight_decay: L2 penalty.
        shorter: Shorter side of an image as it is scaled for the network, in pixels.
        longer: Most pixels of its longer side, for which the shorter one gives way.
        flip: Probability of a mirror image.
        pyramid: Channels of the feature pyramid.
        box_head: Width of the two layers that classify a box.
        anchor: Side of a level's anchors, in strides of the level.
        seed: Of new weights, order, mirror images and sampled boxes.

    Source:
        Ren et al. 2015, https://arxiv.org/abs/1506.01497, and Lin et al. 2017,
        https://arxiv.org/abs/1612.03144, for the network; the drops of the rate are those of the
        usual VOC schedule of 24,000 steps. Our paper names no schedule.
    """

    epochs: Whole = 24
    batch_size: Whole = 16
    learning_rate: float = 0.02
    warmup: Whole = 100
    weight_decay: float = 1e-4
    shorter: Whole = 600
    longer: Whole = 1000
    flip: float = 0.5
    pyramid: Whole = 256
    box_head: Whole = 1024
    anchor: Whole = 8
    seed: Whole = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "anchor"):
            in_range(name, getattr(self, name), least=1)
        for name in ("warmup", "weight_decay"):
            in_range(name, getattr(self, name), least=0)
        in_range("learning_rate", self.learning_rate, above=0)
        in_range("flip", self.flip, least=0, most=1)
        for name in ("pyramid", "box_head"):
            in_range(name, getattr(self, name), least=1, most=4096)
        for name in ("shorter", "longer"):  # a record from elsewhere shall not ask for all memory
            in_range(name, getattr(self, name), least=16, most=4096)
        check_seed(self.seed)


LabelKind = Literal["given", "pseudo", "none"]  # what a defense is told
SHARES: Mapping[LabelKind, float] = {  # of the training images that it has: the CBD paper's
    "given": 0.01,
    "pseudo": 0.05,
    "none": 0.05,
}


def check_seed(seed: int, *, name: str = "seed") -> None:
    """Raise a SettingsError unless PyTorch and NumPy both take ``seed``."""
    if not 0 <= seed < 2**32:
        raise SettingsError(f"{name} is 0 to {2**32 - 1}, as NumPy takes it, got {seed}")


SCHEMES = ("cifar10", "fashion-mnist")  # kinds of image sources that have a name, see ``data``


def at_home(place: str) -> Path:
    """Return ``place`` with ``~`` written out.

    Raises:
        DataError: If it names the folder of a user that is not there.
    """
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise DataError(f"{place}: no such user; write the whole path") from error


def in_range(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    """Raise a SettingsError unless ``value`` is a number in the range."""
    too_low = (least is not None and not value >= least) or (
        above is not None and not value > above
    )
    if too_low or (most is not None and not value <= most):
        low = "" if least is None else f"at least {least:g}"
        low = low if above is None else f"above {above:g}"
        high = "" if most is None else f"at most {most:g}"
        raise SettingsError(
            f"{name} must be {' and '.join(filter(None, (low, high)))}, got {value}"
        )
