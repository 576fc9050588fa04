"""What happens to pixels on the way in: transparency, grey or colour, crop and resize.

All of it is integer arithmetic or Pillow on one image at a time, so a pixel depends on its own image alone:
not on the batch, on threads, on the device or on whether the data were decoded at once or on demand.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

WHITE = 255


def composite(pixels: np.ndarray, background: int = WHITE) -> np.ndarray:
    """Transparency laid on an even grey: ``(c a + background (255 - a) + 127) // 255``.

    Args:
        pixels: uint8 ``[..., c]``; 2 or 4 channels have alpha (not premultiplied) last.
        background: grey level 0..255 behind the picture.

    Returns:
        uint8 ``[..., 1 or 3]``; the input itself where it has no alpha.
    """
    if pixels.shape[-1] not in (2, 4):
        return pixels
    colour, alpha = pixels[..., :-1].astype(np.uint16), pixels[..., -1:].astype(np.uint16)
    return ((colour * alpha + background * (255 - alpha) + 127) // 255).astype(np.uint8)


def to_channels(pixels: np.ndarray, channels: int | None) -> np.ndarray:
    """Grey is repeated; colour becomes ITU-R 601 luma, ``(19595 R + 38470 G + 7471 B + 2**15) // 2**16``.

    Args:
        pixels: uint8 ``[..., 1 or 3]``.
        channels: 1, 3, or None to keep what is there.

    Returns:
        uint8 ``[..., channels]``.
    """
    if channels is None or pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    weighted = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], dtype=np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)[..., None]


def fit_square(image: np.ndarray, side: int) -> np.ndarray:
    """The largest centred square, resized to ``side`` with Pillow's antialiased LANCZOS.

    Args:
        image: uint8 ``[h, w, 1 or 3]``.
        side: pixels per edge of the result.

    Returns:
        uint8 ``[side, side, c]``; the input itself where it already has that size.
    """
    height, width, channels = image.shape
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    square = image[top : top + edge, left : left + edge]
    if edge == side:
        return square
    picture = Image.fromarray(np.ascontiguousarray(square[..., 0] if channels == 1 else square))
    return np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)).reshape(side, side, channels)


def prepare(stack: np.ndarray, *, channels: int | None, resize: int | None, background: int = WHITE) -> np.ndarray:
    """Transparency, then channels, then crop and resize, then channels first.

    Args:
        stack: uint8 ``[n, h, w, c]``, ``c`` 1 to 4.
        channels: 1, 3 or None.
        resize: edge of the square, or None to keep the size.
        background: see :func:`composite`.

    Returns:
        uint8 ``[n, c, h, w]``, contiguous.
    """
    stack = to_channels(composite(stack, background), channels)
    if resize is not None:
        stack = np.stack([fit_square(image, resize) for image in stack])
    return np.ascontiguousarray(stack.transpose(0, 3, 1, 2))
