"""What the server that forks CPU ranks imports once, so that several ranks pay NeMo's import of ten seconds once.

Silent: the libraries warn at import about kernels a CPU has no use for. A module that cannot be imported here is
imported again, and its error seen, by the rank that needs it.
"""

import contextlib
import importlib

from nemo_pre.compat import unified_memory
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
with silence():
    for module in MODULES:
        with contextlib.suppress(Exception):
            importlib.import_module(module)
