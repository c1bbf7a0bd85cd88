"""The sizes of the tensors of known models."""

from __future__ import annotations

__all__ = ["resnet50"]


def resnet50() -> list[int]:
    """Return the sizes of the 161 tensors of ResNet-50, in their order.

    Returns
    -------
    list of int
        Elements, 25.6 million in all.
    """
    sizes = [64 * 3 * 7 * 7, 64, 64]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes += [width * width_in, width, width]
            sizes += [width * width * 9, width, width]
            sizes += [4 * width * width, 4 * width, 4 * width]
            if block == 0:
                sizes += [4 * width * width_in, 4 * width, 4 * width]
            width_in = 4 * width
    return [*sizes, 1000 * 2048, 1000]
