"""The learning rate of each part of the model."""

from __future__ import annotations

from nemo_pre.config.schema import OptimConfig
from nemo_pre.objectives.registry import trained

# Which part of the model a parameter belongs to, by its name without the wrappers' "module." prefixes; what objectives
# train has lr_heads.
MODULE_RATES = {
    "vision_model.": "lr_vision",
    "vision_projection.": "lr_projector",
    "language_model.": "lr_language",
}


def rates(optim: OptimConfig) -> dict[str, float]:
    """The peak rate of every part, by what the names of its parameters begin with; a part without a rate of its own
    has ``optim.lr``."""
    fields = MODULE_RATES | dict.fromkeys(trained(), "lr_heads")
    own = {prefix: getattr(optim, field) for prefix, field in fields.items()}
    return {prefix: optim.lr if rate is None else rate for prefix, rate in own.items()}  # 0 is a rate


def learning_rate(name: str, optim: OptimConfig) -> float:
    """Peak learning rate of the parameter called ``name``."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    for prefix, rate in rates(optim).items():
        if name.startswith(prefix):
            return rate
    raise AssertionError(f"parameter {name} belongs to no module with a learning rate")
