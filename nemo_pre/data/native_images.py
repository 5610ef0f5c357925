"""Native resolution: from an encoded image to rows of patches, its aspect ratio kept, as Qwen2.5-VL takes them.

Both sides are rounded to multiples of a visual token's side (Qwen2.5-VL's is 28 pixels: 2 x 2 patches of 14; AIMv2's
a patch), so that the image has between the least and the most visual tokens. Sizes and pixels are those of
``transformers``' slow ``Qwen2VLImageProcessor``, but for its second copy of every patch (Qwen2.5-VL's tower takes
pairs of video frames), which :mod:`nemo_pre.neva.native_qwen_vl` makes where it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_pre.data.decoding import decoded, header_size, of_sample
from nemo_pre.data.errors import SampleError
from nemo_pre.data.images import normalised, resized

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


@dataclass(frozen=True)
class NativeResolution:
    """The sizes that images of native resolution are brought to.

    Attributes:
        patch_size: pixels.
        merge: patches along each side of a visual token.
        least, most: visual tokens of an image.
    """

    patch_size: int
    merge: int
    least: int
    most: int

    @property
    def side(self) -> int:
        """Pixels of a visual token."""
        return self.merge * self.patch_size

    def grid(self, width: int, height: int, where: str) -> tuple[int, int]:
        """Rows and columns of visual tokens of an image of ``width`` x ``height`` pixels.

        Raises:
            SampleError: it is so thin that it cannot be resized into the limits.
        """
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        side = self.side
        try:
            height_to, width_to = smart_resize(height, width, side, self.least * side**2, self.most * side**2)
        except ValueError as error:
            raise SampleError(f"{where} has an image of {width} x {height} pixels: {error}") from error
        rows, columns = height_to // side, width_to // side
        if rows * columns > self.most:
            raise SampleError(
                f"{where} has an image of {width} x {height} pixels, too thin for "
                f"model.vision.max_visual_tokens={self.most}: it would have {rows} x {columns}"
            )
        return rows, columns

    def grid_of(self, source: bytes, where: str) -> tuple[int, int]:
        """Rows and columns of visual tokens of an encoded image, of which only the header is read."""
        with of_sample(where):
            size = header_size(source)
        return self.grid(size[0], size[1], where)

    def patches(
        self, source: bytes | Image, mean: Sequence[float], std: Sequence[float], where: str, image_filter: str
    ) -> torch.Tensor:
        """float32 [rows, columns, merge ** 2, 3 * patch_size ** 2]: of every visual token its patches, row by row.

        Raises:
            SampleError: the bytes are not a whole image, or it is too thin.
        """
        image = decoded(source, where)
        rows, columns = self.grid(*image.size, where)
        merge, patch = self.merge, self.patch_size
        pixels = normalised(resized(image, columns * self.side, rows * self.side, image_filter), mean, std)
        pixels = pixels.view(3, rows, merge, patch, columns, merge, patch)
        return pixels.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows, columns, merge**2, 3 * patch**2)
