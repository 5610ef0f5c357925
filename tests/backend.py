"""Which backend this environment has: NeMo's, or plain Megatron-Core in a loop of one's own (``nemo_pre.core``).

A test that holds on both is marked ``core``; where NeMo is not installed these alone are run (``make test-core``).
"""

import importlib.util

NEMO, CORE = "nemo", "core"
BACKEND = NEMO if importlib.util.find_spec("nemo") is not None else CORE
