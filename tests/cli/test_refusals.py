"""Every option of every verb, with values off its range and of other types: one sentence, and nothing is started.

The cases are made of the options themselves: parameters of verbs, words of those that take a run's options, and the
fields of a run's configuration.
"""

from __future__ import annotations

import errno
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nemo_pre import cli
from nemo_pre.config.compose import compose_config, compose_run
from nemo_pre.config.help import run_options
from nemo_pre.config.run import RunConfig
from nemo_pre.config.words import as_override, option_names
from nemo_pre.options import Rule, nearest

FUNCTIONS = [name for name, verb in cli.VERBS.items() if verb.usage is None]
WITH_RUN = [name for name, verb in cli.VERBS.items() if verb.usage is not None]
LARGE = "99999999999999999999999"
WRONG_NUMBERS = ("-1", "nan", "inf", "-inf", "many", "1e999", LARGE, "[1]", "")


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which ``nemo-pre WORDS`` refuses."""
    code = cli.main(words)
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert code == 2, (words, code, said)
    assert lines and lines[-1].startswith("nemo-pre: "), (words, said)
    assert "Traceback" not in said and len(lines) == 1, (words, said)
    return lines[0]


def misspelt(name: str) -> str:
    """The name with its last two letters in the wrong order."""
    return name[:-2] + name[-1] + name[-2]


def kinds_of(hint: Any) -> dict[type, Rule]:
    if typing.get_origin(hint) is not None and "Sequence" in str(typing.get_origin(hint)):
        (hint,) = typing.get_args(hint)
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return dict(map(cli._kind_and_rule, typing.get_args(hint) if union else (hint,)))


def wrong_values(kinds: dict[type, Rule]) -> Iterator[str]:
    """Texts that are no value of these types, or one that the rule refuses."""
    if str in kinds:
        yield from ("",) if not kinds[str].may_be_empty else ()
        yield from ("nonsense",) if kinds[str].choices else ()
        return
    yield "nonsense"
    numbers = [rule for kind, rule in kinds.items() if kind in (int, float)]
    for rule in numbers:
        bounds = [rule.least - 1 if rule.least is not None else None, rule.above, rule.most and rule.most + 1]
        yield from (str(int(bound)) for bound in bounds if bound is not None and len(numbers) == 1)
    if numbers:
        yield from ("nan", "inf", "")


def options_of(verb: str) -> Iterator[tuple[Callable[..., Any], str, dict[type, Rule]]]:
    function = cli._resolve(cli.VERBS[verb].function)
    hints = typing.get_type_hints(function, include_extras=True)
    for name in inspect.signature(function).parameters:
        yield function, name, kinds_of(hints[name])


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_a_wrong_value_of_an_option_is_refused_before_its_verb_begins(verb, capsys, monkeypatch):
    """Bounds that a parameter declares are refused while the words are read; nothing else of the verb is run."""
    function, _, _ = next(options_of(verb))
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    for _, name, kinds in options_of(verb):
        others = [f"{p.name}=x" for p in needed if p.name != name and "Sequence" not in str(p.annotation)]
        for value in wrong_values(kinds):
            sentence = refused([*verb.split(), *others, f"{name}={value}"], capsys)
            assert name in sentence, (verb, name, value, sentence)


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_every_number_of_a_verb_is_bounded(verb, tmp_path, capsys, monkeypatch):
    """By its annotation or by the verb itself, which leaves no trace."""
    monkeypatch.chdir(tmp_path)
    function, _, _ = next(options_of(verb))
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    for _, name, kinds in options_of(verb):
        if {int, float} & set(kinds) and name != "feature_layer":  # -1 is a layer
            others = [f"{p.name}=missing" for p in needed if p.name != name and "Sequence" not in str(p.annotation)]
            refused([*verb.split(), *others, f"{name}=-1"], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_a_misspelt_option_is_told_the_nearest(verb, capsys):
    for _, name, _ in options_of(verb):
        if len(name) > 3:
            assert f"the nearest is {name}." in refused([*verb.split(), f"{misspelt(name)}=1"], capsys)


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_a_misspelt_verb_is_told_the_nearest(verb, capsys):
    words = verb.split()
    of_another = " ".join(words[:-1]) in cli.VERBS  # whose option a misspelt second word is taken for
    assert (
        of_another
        or f"the nearest is {verb}." in refused([*words[:-1], words[-1] + "x"], capsys)
        or verb == "data lengths"
    )


# --- the options of a run -------------------------------------------------------------------------------------------


@cache
def base() -> Any:
    return compose_config(["experiment=digits_tiny"])


def problem_of(name: str, value: str) -> str:
    """How a run with the option is refused."""
    with pytest.raises(ValueError) as refusal:
        set_in_a_run(name, value)
    return str(refusal.value)


def set_in_a_run(name: str, value: str) -> None:
    """Composing anew takes half a second; what Hydra would do with the parsed value is done to a run that was composed
    once."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from nemo_pre.config import compose
    from nemo_pre.options import value_problems

    with compose._one_sentence():
        parsed = OverridesParser.create().parse_override(as_override(f"{name}={value}"))
        config = base().copy()
        OmegaConf.update(config, parsed.key_or_group, parsed.value(), merge=True)
        for problem in value_problems(OmegaConf.to_object(config)):
            raise ValueError(problem)


def test_every_number_of_a_run_is_bounded_and_says_so():
    from nemo_pre.checks.run import check_options

    for option in run_options():
        kinds = {word for word in ("int", "float") if word in option.kind}
        if not kinds or "[" in option.name or option.name.endswith((".layers", "feature_layer", "image_mean")):
            continue  # an index, which Hydra does not take; what the model bounds; what has no bounds
        assert option.rule is not None and option.rule.has_range, f"{option.name} has no bounds"
        for value in ("-2", "nan", "inf", "many", "true"):
            listed = f"[{value}]" if option.kind.startswith("list") else value
            if value == "-2" and option.rule.least is None and option.rule.above is None:
                continue
            sentence = problem_of(option.name, listed)
            assert sentence.endswith(".") and "\n" not in sentence
            assert option.name.rpartition(".")[2] in sentence, sentence
    assert check_options(compose_run(["experiment=digits_tiny"])) == []


def test_every_text_of_a_run_refuses_to_be_empty():
    for option in run_options():
        if option.kind in ("str", "str or null") and "[" not in option.name:
            assert option.name.rpartition(".")[2] in problem_of(option.name, "")


def test_every_switch_of_a_run_is_true_or_false():
    for option in run_options():
        if option.kind == "bool":
            assert "neither true nor false" in problem_of(option.name, "7")


def test_every_misspelt_option_of_a_run_is_told_the_nearest():
    """But for some that differ from others in little more."""
    found = [nearest(misspelt(name), option_names()) == name for name in option_names()]
    assert sum(found) > 0.95 * len(found)


@pytest.mark.parametrize("verb", WITH_RUN)
@pytest.mark.parametrize("word", ["optim.lrr=1", "optim.lr=inf", "output_dir=", "cluster.devices_per_node=0", "x y"])
def test_every_verb_with_a_runs_options_refuses_a_wrong_one(verb, word, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needed = {"scale": ["experiments=digits_tiny", "gpus=1"]}.get(verb, ["experiment=digits_tiny"])
    refused([*verb.split(), *needed, "cluster=slurm_site", word], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        *([*("plan", "experiment=digits_tiny"), f"{name}={value}"]
          for name in ("cluster.gpus", "best", "images_per_row", "price", "efficiency.matrix")
          for value in WRONG_NUMBERS if (name, value) != ("price", LARGE)),
        *([*("scale", "experiments=digits_tiny", "gpus=1"), word]
          for word in ("gpus=0", "gpus=x", "depths=nan", "price=inf", "action=fly", "gpu=x", "out=", "grid=nowhere")),
        *([*("data", "features", "experiment=digits_tiny"), word]
          for word in ("batch=0", "batch=x", "dtype=int4", "part=0/1", "part=3", "of=nothing")),
        ["plan", "experiment=digits_tiny", "json="],
        ["plan", "experiment=digits_tiny", "json=/proc/x"],
        ["plan", "experiment=digits_tiny", "calibrate=/proc/x"],
        ["train", "experiment=digits_tiny", "--recipes", "/nowhere"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_own_words_of_verbs_with_a_runs_options(words, capsys):
    refused(words, capsys)


def test_a_misspelt_word_of_a_verbs_own_is_told_the_nearest(capsys):
    for verb, word, right in (
        ("plan", "prise=3", "price"),
        ("plan", "jsn=x", "json"),
        ("plan", "efficiency.matrx=1", "efficiency.matrix"),
        ("scale", "actoin=submit", "action"),
        ("scale", "depth=0.5", "depths"),
        ("data features", "dtpe=float32", "dtype"),
        ("submit", "chian=[a]", "chain"),
    ):
        assert f"the nearest is {right}." in refused([*verb.split(), word], capsys)


# --- places that cannot be written ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["data", "demo", "out=/proc/x", "num_scenes=4", "workers=1"],
        ["data", "demo", "out=/dev/null/x", "num_scenes=4", "workers=1"],
        ["data", "demo", f"out=/tmp/{'x' * 300}", "num_scenes=4", "workers=1"],
    ],
    ids=["proc", "below a file", "too long"],
)
def test_a_place_that_cannot_be_written_is_named(words, capsys):
    refused(words, capsys)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_in_every_verb_that_writes(number, tmp_path, capsys, monkeypatch):
    def full(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_text", full)
    assert "The disk is full" in refused(["plan", "experiment=digits_tiny", f"json={tmp_path / 'x.json'}"], capsys)


def test_a_library_that_met_a_full_disk_is_understood():
    from nemo_pre.launch.failures import os_sentence

    error = RuntimeError("writing failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    sentence = "The disk is full for /data/x (No space left on device): make room, or name another place."
    assert os_sentence(error) == sentence
    assert os_sentence(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert os_sentence(RuntimeError("a mistake of ours")) is None
    assert os_sentence(ConnectionResetError(errno.ECONNRESET, "reset")) is None


# --- paths ----------------------------------------------------------------------------------------------------------

WEIRD = (
    "runs/x/checkpoints/step=800", "a b/c", "ä~ö/日本", "a[1],b", "it's", 'say "hi"', "'q'", "a\\", "a\\'b",
    "$HOME/{x}",
    "a:b", "#x", "a;b&c", "(x)", "true", "1e5", "007", "a,b,c", "=", "%j", "*?", "!x", "@", "-x", "\\\\'", "null x",
)  # fmt: skip


@pytest.mark.parametrize("text", WEIRD)
def test_a_path_is_taken_as_it_is_written(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    for name in ("init_from", "output_dir", "model.tokenizer", "objective.pre.external_path"):
        assert parser.parse_override(as_override(f"{name}={text}")).value() == text

    def verb(source: str, out: str = "x") -> None: ...

    given = cli.options(verb, [f"out={text}", f"source={text}"], "v", {})
    assert given == {"out": text, "source": text}


def test_paths_reach_the_run_whatever_they_hold():
    weird = "it's \"a\\'b=c, [d]\\"
    words = [f"init_from={weird}", "output_dir=runs/x=1, [${name}]", "data.path=~/a b", "model.tokenizer=null"]
    words += ["data.blend=[{path: ~/a=b c, weight: 2}, {path: x/y=1}]", "cluster.environment={A: 'x=y z'}"]
    run = compose_run(["experiment=digits_tiny", *words, "cluster.environment.B=a=b", "name=007"])
    home = os.path.expanduser("~")
    assert (run.init_from, run.output_dir, run.data.path) == (weird, "runs/x=1, [007]", f"{home}/a b")
    assert (run.model.tokenizer, run.cluster.environment) == (None, {"A": "x=y z", "B": "a=b"})
    assert run.data.blend is not None and [source.path for source in run.data.blend] == [f"{home}/a=b c", "x/y=1"]


def test_a_bare_path_may_have_an_equals_sign_where_it_exists(tmp_path, monkeypatch):
    from nemo_pre.options import split_paths

    def verb(source: str, out: str = "x") -> None: ...

    monkeypatch.chdir(tmp_path)
    (tmp_path / "step=800").mkdir()
    (tmp_path / "a,b.png").touch()
    assert cli.options(verb, ["step=800", "runs/y=1"], "v", {}) == {"source": "step=800", "out": "runs/y=1"}
    assert split_paths("x.png,a,b.png,c") == ["x.png", "a,b.png", "c"]
    with pytest.raises(ValueError, match="'sorce=x' is not an option of nemo-pre v: the nearest is source"):
        cli.options(verb, ["sorce=x"], "v", {})


def test_a_leading_tilde_is_the_users_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    function = cli._resolve(cli.VERBS["export"].function)
    assert cli.options(function, ["~/x", "out=~/y=1"], "export", {}) == {
        "checkpoint": "/home/somebody/x",
        "out": "/home/somebody/y=1",
    }


def test_the_schema_has_a_rule_for_every_path():
    from nemo_pre.options import RULE

    assert RunConfig.__dataclass_fields__["init_from"].metadata[RULE].path
