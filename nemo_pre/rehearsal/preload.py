"""What the server that forks rehearsed ranks imports once: NeMo, as if Transformer Engine, Apex and flash-attn were
not installed, since their kernels cannot run on fake tensors."""

import sys

KERNELS = ("transformer_engine", "transformer_engine_torch", "apex", "flash_attn")

for package in KERNELS:
    sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # an import of it says that it is not there

import nemo_pre.launch.preload  # noqa: E402, F401
