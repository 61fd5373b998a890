"""Image patterns as plain functions of a size; attacks plant them, diagnostics probe with them."""

import torch

from unbackdoor.types import RawImages


def checkerboard(size: int, *, cell: int = 1) -> RawImages:
    """Return a black-and-white checkerboard with white corners, shape ``(1, 1, size, size)``.

    Args:
        size: Side in pixels.
        cell: Side of one square in pixels.
    """
    index = torch.arange(size) // cell
    return ((index[:, None] + index[None, :] + 1) % 2 * 255).to(torch.uint8)[None, None]
