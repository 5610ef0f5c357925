"""What the fork server imports once, so that every rank starts with it: see :mod:`tests.ranks.launch`."""

import gc
import importlib

MODULES = (
    "lightning.pytorch",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "nemo.collections.llm",
    "nemo.collections.vlm",
    "nemo.lightning",
    "transformers.models.clip.modeling_clip",
    "transformers.models.siglip.modeling_siglip",
)

for module in MODULES:
    try:
        importlib.import_module(module)
    except Exception as error:  # not the end of the server: the rank that needs the module shows the full error
        print(f"the fork server could not import {module}: {error!r}")

# Megatron collects garbage when it saves: on the imported modules too, for a second in every rank, unless frozen.
gc.collect()
gc.freeze()
