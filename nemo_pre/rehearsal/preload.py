"""What the server that forks rehearsed ranks imports once: NeMo, with stand-ins for Transformer Engine, and as if Apex
and flash-attn were not installed, since their kernels cannot run on fake tensors."""

import sys

from nemo_pre.compat import rehearsed_te_package

ABSENT = ("transformer_engine_torch", "apex", "flash_attn")

for package in ABSENT:
    sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # an import of it says that it is not there
rehearsed_te_package.install()

import nemo_pre.launch.preload  # noqa: E402, F401
