"""``nemo-pre VERB [OPTION=VALUE ...]``: the console script.

Importing this imports nothing heavy, so that ``--help`` answers at once; a verb imports what it needs when it runs.
A new verb is one line in ``VERBS``.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Arguments = Sequence[str]


@dataclass(frozen=True)
class Verb:
    summary: str
    run: str  # "module:function", called with the verb's arguments
    usage: str  # "module:function" that returns what --help prints


VERBS = {
    "train": Verb("train a model: experiment=NAME and any override", f"{__name__}:train", f"{__name__}:train_help"),
    "data demo": Verb(
        "prepare the demo's data: scenes of handwritten digits", f"{__name__}:data_demo", f"{__name__}:data_demo_help"
    ),
}


def main(arguments: Arguments | None = None) -> int:
    """Run one command line; returns the exit code: 0, 1 (the run failed) or 2 (the command is wrong)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in words or bool(os.environ.get("NEMO_PRE_TRACEBACK"))
    words = [word for word in words if word != "--traceback"]
    from nemo_pre.launch import RankFailure

    try:
        return _dispatch(words)
    except ValueError as error:
        if show_traceback:
            traceback.print_exc()
        return _complain(str(error), 2)
    except RankFailure as failure:
        if failure.traceback and (show_traceback or "ended with ValueError" not in str(failure)):
            print(failure.traceback, file=sys.stderr)
        return _complain(str(failure), 1)
    except KeyboardInterrupt:
        return _complain("Interrupted.", 130)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(general_help())
        return 0
    if words[0] == "--version":
        from nemo_pre import __version__

        print(f"nemo-pre {__version__}")
        return 0
    name = next((name for name in VERBS if words[: len(name.split())] == name.split()), None)
    if name is None:
        if any(known.startswith(words[0] + " ") for known in VERBS) and words[1:] in ([], ["-h"], ["--help"]):
            print(general_help())
            return 0 if words[1:] else 2
        given = " ".join(words[:2]) if any(known.startswith(words[0] + " ") for known in VERBS) else words[0]
        raise ValueError(f"'{given}' is not a verb of nemo-pre: choose one of {', '.join(VERBS)}.")
    verb, rest = VERBS[name], words[len(name.split()) :]
    if "-h" in rest or "--help" in rest:
        print(_resolve(verb.usage)())
        return 0
    _resolve(verb.run)(rest)
    return 0


def general_help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        f"nemo-pre VERB [OPTION=VALUE ...]\n\n"
        f"NeVA with Predictive Regularization on NVIDIA NeMo.\n\nverbs:\n{verbs}\n\n"
        f"nemo-pre VERB --help explains a verb; --traceback shows where an error came from; --version."
    )


# --- train ----------------------------------------------------------------------------------------------------------


def train(arguments: Arguments) -> None:
    """Compose, check, save the resolved config, and start the ranks."""
    overrides, print_config = _train_options(arguments)
    from nemo_pre.config.compose import compose_config, compose_run, save_resolved, to_yaml

    if print_config:
        print(to_yaml(compose_config(overrides)), end="")
        return
    config = compose_run(overrides)
    from nemo_pre.config.checks import check_run
    from nemo_pre.launch import is_first_rank, launch

    report = check_run(config)
    if is_first_rank():
        for warning in report.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(report.summary(), file=sys.stderr, flush=True)
    if config.dry_run:
        return
    if is_first_rank():
        save_resolved(config, Path(config.output_dir) / "config.yaml")
    launch(config, "nemo_pre.train:run_rank")


def _train_options(arguments: Arguments) -> tuple[list[str], bool]:
    """The overrides, and whether ``--cfg job`` was among them."""
    overrides, print_config = [], False
    words = iter(arguments)
    for word in words:
        if word in ("--cfg", "-c", "--cfg=job"):
            value = "job" if "=" in word else next(words, "")
            if value != "job":
                raise ValueError("--cfg prints the composed config and takes one value: --cfg job.")
            print_config = True
        elif word.startswith("-"):
            raise ValueError(f"'{word}' is not an option of nemo-pre train: see nemo-pre train --help.")
        else:
            overrides.append(word)
    return overrides, print_config


def train_help() -> str:
    import recipes

    width = max(map(len, recipes.groups()))
    choices = "\n".join(f"  {group:{width}}  {', '.join(recipes.choices(group))}" for group in recipes.groups())
    return f"""nemo-pre train experiment=NAME [GROUP=CHOICE ...] [OPTION=VALUE ...]

Trains, starting the ranks of the layout on this machine unless torchrun or srun already did.

  nemo-pre train experiment=digits_tiny_pre                     the demo
  nemo-pre train experiment=digits_tiny_pre --cfg job           print the composed config
  nemo-pre train experiment=digits_tiny_pre dry_run=true        check everything, stop before building the model
  nemo-pre train experiment=digits_tiny parallel=tp2 optim.lr=3e-4 trainer.max_steps=100

groups and their choices:
{choices}

Every option, its unit and default: nemo_pre/config/schema.py. Results go to output_dir (runs/NAME)."""


# --- data -----------------------------------------------------------------------------------------------------------

DEMO_DEFAULTS = {"out": "data/digits"}


def data_demo(arguments: Arguments) -> None:
    from data_prep.digits import prepare

    prepare(**options(prepare, arguments, "data demo", DEMO_DEFAULTS))


def data_demo_help() -> str:
    from data_prep.digits import prepare

    return describe(prepare, "data demo", DEMO_DEFAULTS)


# --- OPTION=VALUE for the parameters of a function ------------------------------------------------------------------


def options(function: Callable[..., Any], arguments: Arguments, verb: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """``["seed=1"]`` as the keyword arguments of ``function``, converted to its annotations.

    Raises:
        ValueError: an unknown option, or a value that does not convert.
    """
    hints = typing.get_type_hints(function)
    names = list(inspect.signature(function).parameters)
    given = dict(defaults)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or name not in names:
            raise ValueError(
                f"'{argument}' is not an option of nemo-pre {verb}: give OPTION=VALUE with one of {', '.join(names)}."
            )
        given[name] = _convert(name, text, hints[name])
    return given


def _convert(name: str, text: str, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in kinds and text.lower() in ("null", "none"):
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text.replace("_", "") if kind is int else text)
            except ValueError:
                continue
    if str in kinds:
        return text
    expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ValueError(f"{name}={text} is not a value of type {expected}.")


def describe(function: Callable[..., Any], verb: str, defaults: dict[str, Any]) -> str:
    """The help text of a verb whose options are the parameters of ``function``."""
    parameters = inspect.signature(function).parameters
    shown = {name: defaults.get(name, parameter.default) for name, parameter in parameters.items()}
    lines = "\n".join(f"  {name}={'null' if value is None else value}" for name, value in shown.items())
    return f"nemo-pre {verb} [OPTION=VALUE ...]\n\n{inspect.getdoc(function)}\n\noptions and defaults:\n{lines}"


def _resolve(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _complain(sentence: str, code: int) -> int:
    print(f"nemo-pre: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
