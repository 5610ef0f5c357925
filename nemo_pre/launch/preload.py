"""What the server that forks CPU ranks imports once, so that several ranks pay NeMo's import of ten seconds once.

Silent: the libraries warn at import about kernels a CPU has no use for. A module that cannot be imported here is
imported again, and its error seen, by the rank that needs it.

Without garbage collection, which would look through what the ten thousand modules make again and again, for a fifth of
the time; and what they made is never looked through later, so that the ranks also keep sharing its memory.
"""

import contextlib
import gc
import importlib

from nemo_pre.compat import first_use, unified_memory
from nemo_pre.launch.silence import silence

MODULES = (
    "lightning.pytorch",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "nemo.collections.llm",
    "nemo.collections.vlm",
    "nemo.lightning",
    "transformers.models.aimv2.modeling_aimv2",
    "transformers.models.clip.modeling_clip",
    "transformers.models.dinov2.modeling_dinov2",
    "transformers.models.siglip.modeling_siglip",
)


unified_memory.apply()
first_use.apply()
gc.disable()
with silence():
    for module in MODULES:
        with contextlib.suppress(Exception):
            importlib.import_module(module)
gc.enable()
gc.freeze()
