"""What the server that forks CPU ranks imports once, so that several ranks pay NeMo's import of ten seconds once.

Silent: the libraries warn at import about kernels a CPU has no use for. A module that cannot be imported here is
imported again, and its error seen, by the rank that needs it.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator

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


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing reaches the file descriptors 1 and 2 meanwhile, from compiled code neither."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(fd) for fd in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for fd in (1, 2):
            os.dup2(nowhere, fd)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, original in zip((1, 2), saved, strict=True):
            os.dup2(original, fd)
            os.close(original)
        os.close(nowhere)


with silence():
    for module in MODULES:
        with contextlib.suppress(Exception):
            importlib.import_module(module)
