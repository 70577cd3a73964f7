"""Resize: Pillow's bilinear filter, by vector instructions where possible.

Pillow scales one pixel at a time, which costs several times what decoding a JPEG does. Both ways
compute the same filter; rounded differently, their values differ by at most 2 grey levels, and
most not at all.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.imaging.canvas import Size

try:
    import cykooz_resizer as vectorised
except ImportError:
    # There is no build for this platform, such as Linux on ARM.
    vectorised = None
else:
    _TRIANGLE: Final = vectorised.ResizeOptions(
        vectorised.ResizeAlg.convolution(vectorised.FilterType.bilinear), use_alpha=False
    )

LARGEST_COPIED: Final = 8 << 20
"""Pixels. The vectorised way needs copies of the image, which this bounds; what is larger once
it is decoded costs far more to decode than to scale."""
COPY_BYTES: Final = 9
"""Of a pixel: the pieces in which Pillow hands it out, which the allocator may keep, the whole that
is made of them, and the other library's own copy."""


def resize(image: Image.Image, size: Size) -> NDArray[np.uint8]:
    """Scale an RGB image, each side by a factor of its own: (height, width, 3).

    A triangle filter, widened to the source's support when shrinking.
    """
    wanted = (size.width, size.height)
    if image.size == wanted:
        return np.asarray(image)
    if vectorised is None or image.width * image.height > LARGEST_COPIED:
        return np.asarray(image.resize(wanted, Image.Resampling.BILINEAR))
    # It can also work on Pillow's own memory, for which it must know how Pillow's structures lie
    # there: where bytes from outside are decoded, copies are the better price.
    source = vectorised.ImageData(*image.size, vectorised.PixelType.U8x3, image.tobytes())
    scaled = vectorised.ImageData(*wanted, vectorised.PixelType.U8x3)
    vectorised.Resizer().resize(source, scaled, _TRIANGLE)
    return np.frombuffer(scaled.get_buffer(), dtype=np.uint8).reshape(*size, 3)
