"""Static lengths: every size that a compiled call sees is rounded up to one of few, so a server compiles a handful."""

from __future__ import annotations


def bucket(length: int, smallest: int = 32) -> int:
    """Returns the least of 0, s, 1.5 s, 2 s, 3 s, 4 s, 6 s, ... (s = `smallest`) that holds `length`."""
    if length <= 0:
        return 0
    size = smallest
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def canvas_side(pixels: int) -> int:
    """Returns the side of the canvas for an image side: 64, 128, then multiples of 256 pixels."""
    for side in (64, 128):
        if pixels <= side:
            return side
    return -(-pixels // 256) * 256
