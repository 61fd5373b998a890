"""Read features: extract them, and classify them by a linear probe or by nearest neighbours."""

import torch
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]  # no types
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]  # no types
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.errors import CheckpointError, DataError
from unbackdoor.types import Features, Labels, RawImages

ITERATIONS = 5_000  # of L-BFGS; it converges in a few hundred
TOLERANCE = 1e-8  # of its gradient; with 1e-4, the default, ASR was off by up to three points
SMALL = 64  # pixels; of larger images a thousand might not fit a GPU's memory
PART = 2_500  # features whose neighbours are found at a time


@torch.no_grad()
def extract(backbone: nn.Module, images: RawImages, *, batch_size: int | None = None) -> Features:
    """Return the features of ``images``, shape ``(n, d)``, float32, on the CPU.

    Args:
        backbone: Maps images in [0, 1] to features; used as it is, so in eval mode.
        images: On any device; batches go to the backbone's.
        batch_size: By default 100, for 250 images of 32 pixels do not fit a CPU's cache, or 1,000
            small ones elsewhere.
    """
    device = next(backbone.parameters()).device
    if batch_size is None:
        batch_size = 100 if device.type == "cpu" or images.shape[-1] > SMALL else 1_000
    batches = images.split(batch_size)
    return torch.cat([backbone(batch.to(device).float() / 255).float().cpu() for batch in batches])


def linear_probe(features: Features, labels: Labels, *, classes: int) -> nn.Linear:
    """Return a linear classifier of ``features``: logistic regression, run until it converges.

    Features are standardized and the L2 penalty is scikit-learn's default (C = 1), so that nothing
    is chosen, by test accuracy least of all; the result is deterministic. The standardization is
    folded into the layer's weights. A class without examples is never predicted.

    Raises:
        CheckpointError: If a feature is NaN or infinite.
        DataError: If the labels are of fewer than two classes, or out of range.
    """
    if not features.isfinite().all():
        raise CheckpointError(
            "the backbone yields NaN or infinite features; its weights are damaged"
        )
    present = labels.unique()
    if len(present) < 2:
        raise DataError(f"a probe needs two classes or more, got labels of {len(present)}")
    if present[0] < 0 or present[-1] >= classes:
        raise DataError(f"labels must lie in 0..{classes - 1}, got {present[0]}..{present[-1]}")
    exact = features.double().numpy()  # in float32 it would end where rounding decides
    scaler = StandardScaler().fit(exact)
    fitted = LogisticRegression(max_iter=ITERATIONS, tol=TOLERANCE).fit(
        scaler.transform(exact), labels.numpy()
    )
    weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if len(present) == 2:  # scikit-learn then keeps one row, the difference of the two
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    weight = weight / torch.from_numpy(scaler.scale_)
    bias = bias - weight @ torch.from_numpy(scaler.mean_)

    probe = nn.Linear(features.shape[1], classes)
    with torch.no_grad():
        probe.weight.zero_()
        probe.bias.fill_(-1e4)
        probe.weight[present] = weight.float()
        probe.bias[present] = bias.float()
    return probe.requires_grad_(False)


class NearestNeighbours(nn.Module):
    """Classifies features by a weighted vote of the most similar labeled ones.

    Args:
        features: Of the labeled images, shape ``(n, d)``.
        labels: Their classes.
        classes: Number of classes.
        neighbours: Voters, weighted by ``exp(cosine / temperature)``.
        temperature: See above.

    Source:
        Wu et al. 2018, section 3.4, https://arxiv.org/abs/1805.01978; with fewer neighbours, for
        there are only some hundred labels.
    """

    def __init__(
        self,
        features: Features,
        labels: Labels,
        *,
        classes: int,
        neighbours: int = 20,
        temperature: float = 0.07,
    ):
        super().__init__()
        self.neighbours = min(neighbours, len(labels))
        self.temperature = temperature
        self.classes = classes
        self.register_buffer("keys", F.normalize(features, dim=1))
        self.register_buffer("labels", labels)

    def forward(self, features: Features) -> Tensor:
        """Return the weight of the votes for each class, shape ``(n, classes)``."""
        return torch.cat([self._votes(part) for part in features.split(PART)])

    def _votes(self, features: Features) -> Tensor:
        similarity = F.normalize(features, dim=1) @ self.get_buffer("keys").T
        nearest, rows = similarity.topk(self.neighbours, dim=1)
        weights = (nearest / self.temperature).exp()
        votes = weights.new_zeros(len(features), self.classes)
        return votes.scatter_add_(1, self.get_buffer("labels")[rows], weights)
