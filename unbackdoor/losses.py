"""The contrastive loss on feature vectors."""

import torch
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.types import Features, Scalar


def nt_xent(a: Features, b: Features, *, temperature: float = 0.5) -> Scalar:
    """Normalized temperature-scaled cross entropy between two views of a batch.

    Row i of ``a`` and row i of ``b`` are a positive pair; the other 2n - 2 rows are its
    negatives. The value is symmetric in ``a`` and ``b`` and blind to the rows' lengths.

    Args:
        a: Features of the first view, shape ``(n, d)``, n >= 2.
        b: Features of the second view, shape ``(n, d)``.
        temperature: Divides the cosine similarities; must be positive.

    Returns:
        The mean over all 2n anchors, shape ``()``; float32 at least, inside autocast too.

    Raises:
        ValueError: If ``temperature <= 0`` or the batch holds fewer than two images.

    Source:
        SimCLR, Algorithm 1, https://arxiv.org/abs/2002.05709.
    """
    n = len(a)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if n < 2:
        raise ValueError(f"nt_xent needs negatives: batch of at least 2 images, got {n}")
    with torch.autocast(a.device.type, enabled=False):
        both = torch.cat([a, b])
        both = both.to(torch.promote_types(both.dtype, torch.float32))
        z = F.normalize(both, dim=1)
        similarity = z @ z.T / temperature
        similarity.fill_diagonal_(-torch.inf)  # an anchor is not its own negative
        positives = torch.arange(2 * n, device=z.device).roll(n)
        return F.cross_entropy(similarity, positives)
