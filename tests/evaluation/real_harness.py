"""The interpreter that has lmms-eval, if there is one: this one, or the one $NEMO_PRE_EVAL_PYTHON names."""

import importlib.util
import os
import sys

import pytest

REAL = sys.executable if importlib.util.find_spec("lmms_eval") else os.environ.get("NEMO_PRE_EVAL_PYTHON")
needs_lmms_eval = pytest.mark.skipif(
    REAL is None,
    reason="lmms-eval is not installed here (extra eval), nor does NEMO_PRE_EVAL_PYTHON name an interpreter",
)
