"""Settings of the defenses; imports no torch, so that help is instant.

A default is the published value, of the paper or of its authors' code; where both are silent, the
attribute says ``ours``.
"""

from dataclasses import dataclass, field
from typing import Literal

from unbackdoor.errors import SettingsError
from unbackdoor.settings import in_range


@dataclass(frozen=True)
class Tuning:
    """Training of a whole network by SGD on the defender's images.

    The values are those behind the CBD paper's tables (its appendix A.2), which took them from
    BackdoorBench. Its code lets the cosine end after 100 epochs whatever ``epochs`` is, so that
    fewer hardly lower the rate: that is ``cosine-100``. Which one the CBD paper had is not known.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images a step; a last batch of one image is left out.
        learning_rate: The first.
        schedule: How it goes on: ``cosine`` to 0 over all steps; ``cosine-100`` to 0 over 100
            epochs, as BackdoorBench's code has it; ``constant``; or ``tenth``: to a tenth after two
            epochs, as NAD's authors have it.
        momentum: Of SGD.
        weight_decay: L2 penalty.
        augment: ``shift``: random crop after padding by 4 pixels (an eighth of a smaller side), and
            mirror images, as BackdoorBench's CIFAR-10 training; ``none``.
    """

    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 0.01
    schedule: Literal["cosine", "cosine-100", "constant", "tenth"] = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: Literal["shift", "none"] = "shift"

    def __post_init__(self) -> None:
        in_range("tuning.epochs", self.epochs, least=1)
        in_range("tuning.batch_size", self.batch_size, least=2)  # one image has no statistics
        in_range("tuning.learning_rate", self.learning_rate, above=0)
        for name in ("momentum", "weight_decay"):
            in_range(f"tuning.{name}", getattr(self, name), least=0)


@dataclass(frozen=True)
class FineTuningSettings:
    """Plain fine-tuning.

    Attributes:
        tuning: 10 epochs: the CBD paper, section 4.
        seed: Of order and augmentation.
    """

    tuning: Tuning = field(default_factory=Tuning)
    seed: int = 0


@dataclass(frozen=True)
class FinePruningSettings:
    """Prune what clean images leave dormant, then fine-tune.

    Attributes:
        kept: Share of the accuracy that pruning must keep. .9: the CBD paper, section 4.
        held_out: Share of the images on which that accuracy is read. Ours.
        per_check: Channels pruned between two readings. 1: Liu et al. 2018.
        most: Share of the channels that may be pruned; one always stays. 1, no rule: likewise.
        stage: Layer whose channels are pruned; "" is the last with a map. Liu et al.: the last
            convolutional layer.
        tuning: 50 epochs: the CBD paper, section 4.
        seed: Of the held-out split, order and augmentation.
    """

    kept: float = 0.9
    held_out: float = 0.2
    per_check: int = 1
    most: float = 1.0
    stage: str = ""
    tuning: Tuning = field(default_factory=lambda: Tuning(epochs=50))
    seed: int = 0

    def __post_init__(self) -> None:
        in_range("kept", self.kept, least=0, most=1)
        in_range("held_out", self.held_out, above=0, most=0.9)
        in_range("per_check", self.per_check, least=1)
        in_range("most", self.most, least=0, most=1)


@dataclass(frozen=True)
class NadSettings:
    """Distil the attention of a fine-tuned teacher.

    Attributes:
        beta: Weight of the attention loss. 1000, at the last stage alone: the CBD paper, A.2.
        stage: Layer whose maps are compared; "" is the last with a map.
        teacher: Fine-tuning of the teacher. 10 epochs: the CBD paper, section 4.
        tuning: Training of the student. 20 epochs: the CBD paper, A.2.
        seed: Of order and augmentation.
    """

    beta: float = 1000.0
    stage: str = ""
    teacher: Tuning = field(default_factory=Tuning)
    tuning: Tuning = field(default_factory=lambda: Tuning(epochs=20))
    seed: int = 0

    def __post_init__(self) -> None:
        in_range("beta", self.beta, least=0)


@dataclass(frozen=True)
class AnpSettings:
    """Prune the neurons that an adversary of the weights uses.

    Attributes:
        epsilon: Largest relative change of a neuron's scale and shift. .4: Wu and Wang 2021.
        attack_steps: Steps of that adversary. 1: likewise.
        alpha: Weight of the loss without the adversary. .2: likewise.
        iterations: Steps of the mask. 2,000: likewise.
        batch_size: Drawn with replacement. 128: likewise.
        augment: ``shift``, as in :class:`Tuning`, or none. ``shift``: the authors'
            ``optimize_mask_cifar.py``.
        learning_rate: Of the masks. .2: likewise.
        momentum: Of the masks' SGD. .9: likewise.
        threshold: Neurons whose mask is not above it are pruned. .2: likewise; their
            ``prune_neuron_cifar.py`` tries all multiples of .05 and leaves the choice to the
            reader of test scores.
        kept: Share of the held-out accuracy that pruning must keep; where the threshold breaks it,
            the highest lower multiple of .05 that does not is taken. 0, no rule: Wu and Wang 2021.
            BackdoorBench allows a loss of .1, and picks among the rest by test scores.
        held_out: Share of the images on which it is read; none where ``kept`` is 0. Ours.
        batch_norm: What normalizes in the search: each batch's own statistics, as in the authors'
            ``optimize_mask_cifar.py``, or the running ones.
        seed: Of the held-out split, batches and the adversary's starts.
    """

    epsilon: float = 0.4
    attack_steps: int = 1
    alpha: float = 0.2
    iterations: int = 2_000
    batch_size: int = 128
    augment: Literal["shift", "none"] = "shift"
    learning_rate: float = 0.2
    momentum: float = 0.9
    threshold: float = 0.2
    kept: float = 0.0
    held_out: float = 0.2
    batch_norm: Literal["batch", "running"] = "batch"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epsilon", "momentum"):
            in_range(name, getattr(self, name), least=0)
        for name in ("alpha", "threshold", "kept"):
            in_range(name, getattr(self, name), least=0, most=1)
        in_range("held_out", self.held_out, above=0, most=0.9)
        for name in ("attack_steps", "iterations"):
            in_range(name, getattr(self, name), least=1)
        in_range("batch_size", self.batch_size, least=2)  # one image has no statistics
        in_range("learning_rate", self.learning_rate, above=0)


@dataclass(frozen=True)
class IbauSettings:
    """Unlearn a universal perturbation by its implicit hypergradient.

    The values are those of the authors' ``defense.py``.

    Attributes:
        rounds: Of finding the perturbation and unlearning it. 5.
        search_rate: Of the gradient steps that find it, one for each batch of images. 10.
        penalty: Of the perturbation's squared length. .001.
        perturbed: Share of every batch that is perturbed in unlearning, one image at least. .01.
        fixed_point_steps: K of the hypergradient's fixed-point iteration. 5.
        inner_rate: Step of the map whose fixed point the perturbation is. .1.
        learning_rate: Of Adam on the weights. 1e-3.
        batch_size: 100.
        seed: Of the order.
    """

    rounds: int = 5
    search_rate: float = 10.0
    penalty: float = 1e-3
    perturbed: float = 0.01
    fixed_point_steps: int = 5
    inner_rate: float = 0.1
    learning_rate: float = 1e-3
    batch_size: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        in_range("rounds", self.rounds, least=1)
        in_range("batch_size", self.batch_size, least=2)  # a last one of one image is left out
        for name in ("inner_rate", "learning_rate"):
            in_range(name, getattr(self, name), above=0)
        for name in ("search_rate", "fixed_point_steps", "penalty"):
            in_range(name, getattr(self, name), least=0)
        in_range("perturbed", self.perturbed, least=0, most=1)


@dataclass(frozen=True)
class AdversarialSettings:
    """Fine-tune on adversarial examples with their true labels, then on clean images.

    The values are those of the authors' ``aft_main.py`` and ``config.py``.

    Attributes:
        epsilon: L-infinity radius on the [0, 1] scale. 6/255.
        steps: Of the search, from the image itself. 7.
        step_size: On the [0, 1] scale. A fifth of the radius.
        adversarial_epochs: The first epochs, which see adversarial images. 3.
        clean: Share of the loss on images as they are in those epochs. 0; later it is 1.
        tuning: 20 epochs, constant rate .001, batch 128.
        seed: Of order and augmentation.
    """

    epsilon: float = 6 / 255
    steps: int = 7
    step_size: float = 1.2 / 255
    adversarial_epochs: int = 3
    clean: float = 0.0
    tuning: Tuning = field(
        default_factory=lambda: Tuning(
            epochs=20, batch_size=128, learning_rate=1e-3, schedule="constant"
        )
    )
    seed: int = 0

    def __post_init__(self) -> None:
        in_range("epsilon", self.epsilon, least=0, most=1)
        for name in ("steps", "step_size", "adversarial_epochs"):
            in_range(name, getattr(self, name), least=0)
        in_range("clean", self.clean, least=0, most=1)


@dataclass(frozen=True)
class ContrastiveSettings:
    """Contrastive fine-tuning: ``purify`` with its third term alone.

    Attributes:
        epochs: 15: the CBD paper, A.2.
        batch_size: 128: likewise.
        learning_rate: .02: likewise.
        temperature: .5: likewise.
        batch_norm: As in ``PurifySettings``; docs/method.md has the reason.
        seed: Of order and views.
    """

    epochs: int = 15
    batch_size: int = 128
    learning_rate: float = 0.02
    temperature: float = 0.5
    batch_norm: Literal["batch", "joint", "frozen", "reference"] = "reference"
    seed: int = 0

    def __post_init__(self) -> None:
        in_range("epochs", self.epochs, least=1)
        in_range("batch_size", self.batch_size, least=2)
        for name in ("learning_rate", "temperature"):
            in_range(name, getattr(self, name), above=0)


@dataclass(frozen=True)
class BcuSettings:
    """Draw a share of the weights anew, then distil from the victim.

    Attributes:
        shares: Of the weights drawn anew: in the first layer, in four groups of equal depth, and
            in the head. Pang et al. 2023, for ResNet-18 (the authors' ``run_defense.sh``).
        match: What is distilled: features, which every backbone has (ours), or the published
            logits.
        spread: Of the weights drawn anew: ``kaiming`` for convolutions, as the network in the code
            of Pang et al. 2023 begins, or as PyTorch's layers begin.
        tuning: Of the distillation. 100 epochs, rate .01, a cosine, batch 256: the authors'
            ``config/defense/ft/cifar10.yaml``.
        seed: Of the weights, order and augmentation.
    """

    shares: tuple[float, ...] = (0.01, 0.01, 0.03, 0.09, 0.27, 0.10)
    match: Literal["features", "logits"] = "features"
    spread: Literal["pytorch", "kaiming"] = "kaiming"
    tuning: Tuning = field(default_factory=lambda: Tuning(epochs=100))
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.shares) != 6:
            raise SettingsError(
                "shares are six: of the first layer, of four groups, of the head; got "
                f"{len(self.shares)}"
            )
        for share in self.shares:
            in_range("shares", share, least=0, most=1)


@dataclass(frozen=True)
class ClpSettings:
    """Prune channels whose Lipschitz bound stands out in their layer.

    Attributes:
        deviations: Standard deviations above the layer's mean, u. 3: Zheng et al. 2022, for
            CIFAR-10.
    """

    deviations: float = 3.0

    def __post_init__(self) -> None:
        in_range("deviations", self.deviations, least=0)
