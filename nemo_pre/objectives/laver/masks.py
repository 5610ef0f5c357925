"""Which visual tokens LaVer masks: a function of seed, step, sample and image, and of nothing else.

No rank's random state enters, so the same tokens are masked in every layout and after every resume.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nemo_pre.objectives.laver import LaVerConfig
from nemo_pre.options import choices_of
from nemo_pre.whole_numbers import part_down


def visual_token_masks(
    images_per_sample: Sequence[int],
    tokens_per_image: Sequence[int],
    ratio: float,
    sampling: str,
    seed: int,
    step: int,
    first_sample: int,
) -> Tensor:
    """Boolean mask of a micro-batch's visual tokens, in the order of the encoder's output; True is masked.

    Args:
        images_per_sample: how many images each sample has.
        tokens_per_image: visual tokens of each image, sample by sample, before any truncation.
        ratio: r. ``bernoulli`` masks each token with probability r (the paper), ``count`` floor(r n) of an image's
            n tokens (the released code).
        seed, step: of the run, and optimizer steps done.
        first_sample: place of the micro-batch's first sample in the global batch; its samples are consecutive there.
    """
    samplings = choices_of(LaVerConfig, "mask_sampling")
    if sampling not in samplings:
        raise ValueError(f"Masks are drawn by '{sampling}': choose one of {', '.join(samplings)}.")
    masks, sizes = [], iter(tokens_per_image)
    for sample, num_images in enumerate(images_per_sample):
        for image in range(num_images):
            size = next(sizes)
            generator = np.random.default_rng([seed, step, first_sample + sample, image])
            if sampling == "bernoulli":
                masks.append(generator.random(size) < ratio)
            else:
                masks.append(generator.permutation(size) < part_down(ratio, size))
    assert next(sizes, None) is None, "more images than the samples have"
    return torch.from_numpy(np.concatenate(masks)) if masks else torch.zeros(0, dtype=torch.bool)
