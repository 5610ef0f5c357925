"""Lightning/NeMo callbacks: they decide when; the arithmetic lives in losses, objectives and parallel.

Every objective has its callback here by its class's name: ``PReCallback(options, seed=0)``.
"""

from typing import Any

__all__ = ["StepPlanning", "TermCallback"]


def __getattr__(name: str) -> Any:
    # Imported on first use: Lightning and torch are heavy, and some callbacks need neither NeMo nor Megatron.
    if name == "StepPlanning":
        from nemo_pre.callbacks.step_planning import StepPlanning

        return StepPlanning
    from nemo_pre.objectives.registry import known

    wanted = next((kind for kind in known().values() if name == f"{kind.__name__}Callback"), None)
    if wanted is None and name != "TermCallback":
        raise AttributeError(f"module 'nemo_pre.callbacks' has no attribute '{name}'")
    from nemo_pre.callbacks.term_callback import TermCallback, callback_of

    if wanted is None:
        return TermCallback
    return globals().setdefault(name, callback_of(wanted))
