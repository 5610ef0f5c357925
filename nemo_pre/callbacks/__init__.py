"""Lightning/NeMo callbacks: they decide when; the arithmetic lives in losses, objective and parallel."""

from typing import Any

__all__ = ["LaVerCallback", "LayerObjective", "PReCallback", "StepPlanner"]


def __getattr__(name: str) -> Any:
    # Imported on first use: Lightning and torch are heavy, and some callbacks need neither NeMo nor Megatron.
    if name == "LaVerCallback":
        from nemo_pre.callbacks.laver import LaVerCallback

        return LaVerCallback
    if name == "LayerObjective":
        from nemo_pre.callbacks.layer_objective import LayerObjective

        return LayerObjective
    if name == "PReCallback":
        from nemo_pre.callbacks.pre import PReCallback

        return PReCallback
    if name == "StepPlanner":
        from nemo_pre.callbacks.step_planner import StepPlanner

        return StepPlanner
    raise AttributeError(f"module 'nemo_pre.callbacks' has no attribute '{name}'")
