"""From an encoded image to the tensor the vision tower takes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_pre.data.errors import SampleError

if TYPE_CHECKING:
    import torch
    from PIL import Image


def image_tensor(
    source: bytes | Image.Image, image_size: int, mean: Sequence[float], std: Sequence[float], where: str
) -> torch.Tensor:
    """float32 [3, image_size, image_size]: RGB, resized (bicubic, aspect ratio not kept), (x / 255 - mean) / std.

    Raises:
        SampleError: the bytes are not a whole image.
    """
    import numpy as np
    import torch
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
        image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"{where} has an image that cannot be decoded ({error})") from error
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0
    shape = (3, 1, 1)
    return ((pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)).contiguous()
