"""Visual degradation while it happens: a few of the diagnostics during training, on the same pictures every time."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from nemo_pre.callbacks.metrics import record_metrics
from nemo_pre.config.run import RunConfig

PICTURES, FIT_PICTURES = 64, 256
FORWARD_ROWS = 4  # micro-batches at a time: a pass without a graph keeps one layer's activations
LOGGED = ("pairwise_cosine", "effective_dimension", "contrast", "contrast_difference", "cka_to_layer_0")


class DiagnosticsCallback(Callback):
    """Every ``trainer.log_diagnostics_every`` steps, and at the end, records ``diagnostics/MEASURE/layer_<l>`` and
    ``diagnostics/probe_TASK/layer_<l>`` of the first pictures of the val split, with probes fitted on the first of the
    train split; see :mod:`nemo_pre.diagnostics`. Works in every layout; every rank takes part.

    It costs a forward pass of ``PICTURES`` + ``FIT_PICTURES`` pictures, which replicas share out, and, by layer, seven
    eigendecompositions of the hidden width in float64, which ranks with the same layers share out; the time it took
    is recorded as ``diagnostics/seconds``.

    Raises:
        ValueError: when fitting starts, if the data have no such pictures.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._measured_at = -1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        from nemo_pre.data.preprocessing import build_preprocessing
        from nemo_pre.diagnostics.samples import read_data

        self._how = build_preprocessing(self.config)
        self._data = read_data(self.config.data.path, FIT_PICTURES, PICTURES)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        every = self.config.trainer.log_diagnostics_every
        if every and trainer.global_step % every == 0:
            self._record(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._measured_at != trainer.global_step:
            self._record(trainer)

    def _record(self, trainer: Any) -> None:
        from nemo_pre.diagnostics.layers import measure
        from nemo_pre.diagnostics.megatron import MegatronModel
        from nemo_pre.neva.model import model_chunks

        self._measured_at = trainer.global_step
        started = time.perf_counter()
        rows = FORWARD_ROWS * self.config.trainer.micro_batch_size
        model = MegatronModel(model_chunks(trainer), self._how, self.config, self._data.background, rows)
        at_a_time = rows * self.config.parallel.pipeline
        found = measure(model, self._data, at_a_time, everything=False)["layers"]
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, found)
        layers = {layer: result for part in of_ranks for layer, result in part.items()}
        metrics = {"diagnostics/seconds": time.perf_counter() - started}
        for layer in sorted(layers):
            metrics |= _named(layer, layers[layer])
        record_metrics(trainer, metrics)


def _named(layer: int, result: dict[str, Any]) -> dict[str, float]:
    values = {name: result[name] for name in LOGGED}
    values |= {f"probe_{task}": probe["accuracy"] for task, probe in result["probe"].items()}
    return {f"diagnostics/{name}/layer_{layer}": value for name, value in values.items() if value is not None}
