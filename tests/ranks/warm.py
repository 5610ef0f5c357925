"""What the fork server imports once, so that every rank starts with it: see :mod:`tests.ranks.launch`.

The product's own list, and what only tests build.
"""

import gc

import nemo_pre.launch.preload  # noqa: F401  # before Megatron, which it makes importable

# isort: split
import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

# Megatron collects garbage when it saves: on the imported modules too, for a second in every rank, unless frozen.
gc.collect()
gc.freeze()
