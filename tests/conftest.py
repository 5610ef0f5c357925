"""The suite proves its claims on CPU ranks, on every machine alike: GPUs are hidden, and nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from nemo_pre.launch import prepare_environment

prepare_environment(platform="cpu", local_ranks=2)
