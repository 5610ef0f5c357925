"""Patch features of a frozen vision model of ``transformers``, which visual tokens are compared with.

The features are what the model calls its last hidden state, after its last norm, without class and register tokens.
CLIP is the exception: the norm behind its last layer is trained on the class token alone, so its patches come as the
last layer gives them.

Sources: PRe's supplement (arXiv 2603.20808), table 5 (DINOv2-vitb14-reg4, DINOv3-vitb16, SAM-vitb); VIRAL
(arXiv 2509.07979). How grids of different sizes are matched is not published for the former; here the model's grid is
resampled bilinearly, antialiased, to the grid of visual tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_pre.objectives.target import Target
from nemo_pre.terms.vision_facts import last_hidden_state, named_path, read_statistics, vision_facts, vision_part

NOT_USED = ("pooler", "head")  # parts of a vision model that its patch features do not depend on


class FrozenVision:
    """A frozen vision model on the first pipeline stage; it is not part of the trained model.

    Args:
        target: the model, and the size of the pictures it sees.
        device: where it runs, in float32.
        image_mean, image_std: how the incoming pixels were normalised for the model that is trained.

    Raises:
        ValueError: as :func:`vision_facts` and :func:`read_statistics`, or the weights are not all there.
    """

    def __init__(self, target: Target, device: torch.device, image_mean: list[float], image_std: list[float]) -> None:
        self.target, self.facts = target, vision_facts(target)
        self.statistics = read_statistics(target)
        self.model = load_model(target).to(device)
        # On the device from the start: numbers that go there for every micro-batch would be waited for.
        self._columns = {
            name: torch.tensor(values, dtype=torch.float64, device=device).view(1, 3, 1, 1)
            for name, values in (
                ("seen mean", image_mean),
                ("seen std", image_std),
                ("own mean", self.statistics.mean),
                ("own std", self.statistics.std),
            )
        }

    @torch.no_grad()
    def __call__(self, images: Tensor, tile_tokens: int) -> Tensor:
        """Features ``[num_tiles, tile_tokens, width]`` of ``images`` ``[num_tiles, 3, H, W]``, in float32."""
        side = round(tile_tokens**0.5)
        if side * side != tile_tokens:
            raise ValueError(
                f"{self.target.option('path')} needs a square grid of visual tokens, not {tile_tokens} tokens."
            )
        grid = self._grid(last_hidden_state(self.model, self.pixels(images.float())))
        grid = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        return grid.flatten(2).transpose(1, 2)

    def pixels(self, images: Tensor) -> Tensor:
        """The picture as the frozen model's own processor would normalise it, in the size it is shown."""

        column = {name: values.to(images.dtype) for name, values in self._columns.items()}
        pictures = images * column["seen std"] + column["seen mean"]
        pictures = (pictures * self.statistics.scale - column["own mean"]) / column["own std"]
        size = (self.facts.image_size, self.facts.image_size)
        return F.interpolate(pictures, size=size, mode=self.target.image_filter, align_corners=False, antialias=True)

    def _grid(self, output: Tensor) -> Tensor:
        """``[N, width, side, side]`` of a map, or of ``[N, prefix + side^2, width]``."""
        side, prefix = self.facts.side, self.facts.prefix
        if prefix is None:
            return output
        return output[:, prefix:].transpose(1, 2).reshape(len(output), -1, side, side)


def load_model(target: Target) -> nn.Module:
    """The vision model with its weights, frozen, in float32.

    Raises:
        ValueError: a weight that features depend on is missing; ``transformers`` would draw it at random.
    """
    from transformers import AutoModel

    path = named_path(target)
    try:
        whole, report = AutoModel.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except OSError as error:
        raise ValueError(f"{target.option('path')}={path} cannot be loaded ({error}): download it whole.") from error
    model = vision_part(whole, target)
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    ours = {names[id(parameter)] for parameter in model.parameters()}
    missing = [
        name
        for name in sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])} & ours)
        if not set(name.split(".")) & set(NOT_USED)
    ]
    if missing:
        raise ValueError(
            f"{target.option('path')}={path} has no weights that fit {missing[0]} ({len(missing)} in all are "
            f"missing): name a directory whose weights belong to its config.json."
        )
    return model.eval().requires_grad_(False)
