"""NeMo's telemetry off: it raises in the first checkpoint of a run that NeMo's own recipes did not configure."""

from __future__ import annotations

from nemo_pre.compat.registry import Change, patch


@patch(
    "no-telemetry",
    why="NeMo 2.7 reports every checkpoint to OneLogger, which raises OneLoggerError unless a telemetry configuration"
    " was registered, and no run of ours should report anywhere.",
    until="NeMo registers its telemetry callback only where it is configured.",
    of={"nemo_toolkit": ("2.7.3",)},
)
def no_telemetry():
    from nemo.lightning.callback_group import CallbackGroup

    yield Change(CallbackGroup.get_instance(), "_callbacks", [])


def apply() -> None:
    no_telemetry.apply()


def revert() -> None:
    no_telemetry.revert()
