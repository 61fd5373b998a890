"""The contrastive loss on feature vectors."""

import torch
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.ranks import ALONE, Ranks, gather
from unbackdoor.types import Features, Scalar


def nt_xent(a: Features, b: Features, *, temperature: float = 0.5, ranks: Ranks = ALONE) -> Scalar:
    """Normalized temperature-scaled cross entropy between two views of a batch.

    Row i of ``a`` and row i of ``b`` are a positive pair; the other 2n - 2 rows are its
    negatives. The value is symmetric in ``a`` and ``b`` and blind to the rows' lengths.

    Args:
        a: Features of the first view, shape ``(n, d)``, n >= 2.
        b: Features of the second view, shape ``(n, d)``.
        temperature: Divides the cosine similarities; must be positive.
        ranks: Negatives come from all of them; every rank has n images of the batch.

    Returns:
        The mean over all 2n anchors, shape ``()``; float32 at least, inside autocast too. With
        several ranks, this rank's share of it: their sum is the loss of the whole batch.

    Raises:
        ValueError: If ``temperature <= 0`` or the batch holds fewer than two images.

    Source:
        SimCLR, Algorithm 1, https://arxiv.org/abs/2002.05709.
    """
    n = len(a)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if n * ranks.count < 2:
        raise ValueError(f"nt_xent needs negatives: batch of at least 2 images, got {n}")
    with torch.autocast(a.device.type, enabled=False):
        both = torch.cat([a, b])
        both = both.to(torch.promote_types(both.dtype, torch.float32))
        z = F.normalize(both, dim=1)
        everyone = z
        if ranks.count > 1:
            everyone = gather(z, ranks).roll(-2 * n * ranks.rank, 0)  # own rows first
        similarity = z @ everyone.T / temperature
        similarity.fill_diagonal_(-torch.inf)  # an anchor is not its own negative
        positives = torch.arange(2 * n, device=z.device).roll(n)
        loss = F.cross_entropy(similarity, positives)
        return loss if ranks.count == 1 else loss / ranks.count
