"""Patch features of a frozen vision foundation model (DINOv2, DINOv3, SAM ...) as PRe's anchor.

Source: PRe's supplement, table 5 (anchors DINOv2-vitb14-reg4, DINOv3-vitb16, SAM-vitb). How the grids were matched
is not published; here the external grid is resampled bilinearly to the visual tokens' grid.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _load_config(path: str | None) -> Any:
    from transformers import AutoConfig

    if path is None:
        raise ValueError(
            "objective.pre.anchor=external needs objective.pre.external_path, a vision model's directory."
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The external anchor '{path}' is neither a local directory nor a hub id that can be reached from here: "
            f"set objective.pre.external_path to a downloaded copy."
        ) from error
    return getattr(config, "vision_config", config)


class ExternalAnchor:
    """A frozen ``transformers`` vision model on the first pipeline stage; not part of the trained model.

    Args:
        path: directory or hub id.
        image_size: pixels the images are resized to; None keeps the model's own size.
        device: where it runs, in float32.
        image_mean, image_std: how the incoming pixels were normalised for the model that is trained.
    """

    def __init__(
        self,
        path: str | None,
        image_size: int | None,
        device: torch.device,
        image_mean: list[float],
        image_std: list[float],
    ) -> None:
        from transformers import AutoImageProcessor, AutoModel

        config = _load_config(path)
        model = AutoModel.from_pretrained(path)
        self.model = getattr(model, "vision_encoder", getattr(model, "vision_model", model))
        self.model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
        self.image_size = image_size or config.image_size
        self.patch_size = config.patch_size
        try:
            processor = AutoImageProcessor.from_pretrained(path)
            self.mean, self.std = processor.image_mean, processor.image_std
        except OSError:  # weights without a processor: ImageNet statistics, which all of these models use
            self.mean, self.std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        self.image_mean, self.image_std = image_mean, image_std

    @staticmethod
    def width(path: str | None) -> int:
        """Width of the anchor, read from the config alone (every pipeline stage needs it)."""
        config = _load_config(path)
        return int(getattr(config, "output_channels", None) or config.hidden_size)

    @torch.no_grad()
    def __call__(self, images: Tensor, tile_tokens: int) -> Tensor:
        """Features ``[num_tiles * tile_tokens, width]`` of ``images`` ``[num_tiles, 3, H, W]``."""
        pixels = self._pixels(images.float())
        output = self.model(pixel_values=pixels).last_hidden_state
        grid = output if output.ndim == 4 else self._grid(output)
        side = round(tile_tokens**0.5)
        if side * side != tile_tokens:
            raise ValueError(f"The external anchor needs a square grid of visual tokens, not {tile_tokens} tokens.")
        grid = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        return grid.flatten(2).transpose(1, 2).reshape(-1, grid.shape[1])

    def _pixels(self, images: Tensor) -> Tensor:
        def column(values: list[float]) -> Tensor:
            return images.new_tensor(values).view(1, 3, 1, 1)

        images = images * column(self.image_std) + column(self.image_mean)
        images = (images - column(self.mean)) / column(self.std)
        size = (self.image_size, self.image_size)
        return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)

    def _grid(self, tokens: Tensor) -> Tensor:
        """``[N, width, side, side]`` from ``[N, prefix + side^2, width]``: class and register tokens come first."""
        side = self.image_size // self.patch_size
        return tokens[:, -side * side :].transpose(1, 2).reshape(tokens.shape[0], -1, side, side)
