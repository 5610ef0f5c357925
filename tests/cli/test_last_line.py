"""Every verb says last what it made and what comes next."""

import inspect
import string

import pytest

from nemo_pre import cli

# Those that write the line themselves: they take words, or know what was made only when it is.
OWN = {
    "train",
    "plan",
    "scale",
    "rehearse",
    "rehearse all",
    "submit",
    "data lengths",
    "data features",
    "import",
    "evaluate",
    "study digits",
    "study encoder",
    "study real",
    "teach",
    "report",
}


def test_a_verb_has_a_last_line_or_writes_its_own():
    assert {name for name, verb in cli.VERBS.items() if verb.last is None} == OWN
    for name in OWN:
        module = cli.VERBS[name].function.partition(":")[0]
        package = {"nemo_pre.verbs.features": "nemo_pre.features.encode"}.get(module, module)
        assert "next: " in inspect.getsource(__import__(package, fromlist=["x"])), name


@pytest.mark.parametrize("name", sorted(cli.VERBS.keys() - OWN))
def test_the_last_line_names_options_of_the_verb_and_a_verb(name):
    verb = cli.VERBS[name]
    assert verb.last is not None
    parameters = inspect.signature(cli._resolve(verb.function)).parameters
    assert {field for _, field, _, _ in string.Formatter().parse(verb.last) if field} <= set(parameters)
    command = verb.last.partition("; next: nemo-pre ")[2]
    assert any(command.startswith(known) for known in cli.VERBS)


def test_it_is_written_with_the_values_given_and_left_out_where_nothing_was_made(monkeypatch, capsys):
    def generate(checkpoint: str, prompt: str | None = None, out: str | None = None) -> None:
        print("the answer")

    monkeypatch.setattr("nemo_pre.inference.generate", generate)
    assert cli.main(["generate", "runs/x", "prompt=what?"]) == 0
    assert capsys.readouterr().out == "the answer\n"
    assert cli.main(["generate", "runs/x", "prompt=what?", "out=a {b}.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "a {b}.jsonl; next: nemo-pre export runs/x HF_DIR"
