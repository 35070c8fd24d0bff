"""The command line: every mistake ends in one line on stderr and the exit code of its kind."""

import subprocess
import sys
import types

import pytest

from attnlab.commands import COMMANDS
from attnlab.config import base, to_json
from attnlab.errors import DataError, UserError
from attnlab.flags import Command
from attnlab.main import main


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Everything the command line may write stays in the test's own directory."""
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))


@pytest.fixture
def called(monkeypatch):
    """Replaces the rooms that commands lead to, and collects the keyword arguments they got."""
    calls = {}

    def stand_in(module: str, name: str):
        def call(**arguments):
            calls.update(arguments)

        room = types.ModuleType(f"attnlab.{module}")
        setattr(room, name, call)
        monkeypatch.setitem(sys.modules, f"attnlab.{module}", room)

    for module, name in [
        ("train", "train"),
        ("evaluate", "evaluate"),
        ("decode", "generate"),
        ("report", "report"),
    ]:
        stand_in(module, name)
    return calls


@pytest.fixture
def run_dir(tmp_path):
    """A workdir that holds a run."""
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.json").write_text(to_json(base("window")))
    return str(tmp_path / "runs" / "first")


def complaint(capsys) -> str:
    """The single line on stderr."""
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1, lines
    assert output.out == ""
    return lines[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("train", "attnlab: train needs --workdir, for example --workdir=runs/first"),
        ("train --confg=x", "attnlab: train has no flag --confg; did you mean '--config'"),
        ("train --workdir", "--workdir needs a value"),
        ("train now", "'now' is not a flag"),
        ("train --workdir=w", "/w (no config.json)"),
        ("plan", "attnlab: plan needs --config, for example --config=configs/quickstart.py"),
        ("plan --config=configs/lm.yaml", "no config file 'configs/lm.yaml'; did you mean"),
        ("plan --config=configs/ml.py", "did you mean 'configs/lm.py'"),
        ("plan --config=configs/lm.py:attention=windw", "unknown mechanism 'windw'; did you mean"),
        ("plan --config=configs/lm.py:attn=window", "unknown config argument 'attn'; did you mean"),
        ("plan --config=configs/lm.py --config.optimizer.lr=1", "'optimizer.learning_rate'?"),
        ("plan --config=configs/lm.py --config.model.heads=2.5", "expected an integer, such as 4"),
        ("plan --config=configs/lm.py --config.model.heads=7", "use heads of 4 or 8"),
        ("plan --config=configs/lm.py --config.model.heads", "needs a value"),
        ("generate --workdir=nowhere", "/nowhere (no config.json)"),
        ("evaluate --workdir=w --length=long", "--length=long: expected an integer"),
        ("evaluate --workdir=w --config.seed=1", "has no flag --config.seed"),
        ("generate --workdir=w --temprature=1", "did you mean '--temperature'"),
        ("list windw", "nothing called 'windw' to list; did you mean 'window'?"),
        ("list softmax window", "one thing at a time"),
        ("data", "known: get, info, list"),
        ("data got kjv", "did you mean 'get'?"),
        ("data get", "usage: attnlab data get NAME"),
        ("report", "needs the workdirs to compare"),
    ],
)
def test_a_typed_mistake_is_one_line_and_exit_2(capsys, line, message):
    assert main(line.split()) == 2
    assert message in complaint(capsys)


def test_data_too_short_for_a_sequence_is_exit_3(capsys, tmp_path):
    (tmp_path / "tiny.txt").write_bytes(b"too little")
    corpus = f"corpus=text:{tmp_path}/*.txt"
    assert main(["plan", f"--config=configs/lm.py:{corpus}"]) == 3
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err


def test_a_value_may_follow_its_flag_with_a_space_or_an_equals_sign(called, tmp_path):
    spaced = ["--workdir", "w", "--config", "configs/lm.py", "--config.train.steps", "5"]
    for words in (spaced, ["--workdir=w", "--config=configs/lm.py", "--config.train.steps=5"]):
        called.clear()
        assert main(["train", *words]) == 0
        assert called["config"].train.steps == 5
        assert called["workdir"] == "w"
        assert called["command"] == ["attnlab", "train", *words]


def test_train_without_a_config_goes_on_with_that_of_the_workdir(called, run_dir):
    assert main(["train", f"--workdir={run_dir}", "--config.train.steps=9"]) == 0
    assert called["config"].attention.name == "window"
    assert called["config"].train.steps == 9


def test_commands_pass_on_only_what_was_given(called, run_dir):
    assert main(["evaluate", f"--workdir={run_dir}", "--length=1024", "--step", "40"]) == 0
    assert called == {"workdir": run_dir, "length": 1024, "step": 40}
    called.clear()
    given = ["--prompt=In the beginning", "--top_k=5", "--temperature=0"]
    assert main(["generate", f"--workdir={run_dir}", *given]) == 0
    expected = {"prompt": "In the beginning", "top_k": 5, "temperature": 0.0}
    assert called == {"workdir": run_dir, **expected}
    called.clear()
    assert main(["report", "runs/a", "runs/b", "--out=table.md"]) == 0
    assert called == {"workdirs": ["runs/a", "runs/b"], "out": "table.md"}


def test_a_missing_run_names_those_nearby(capsys, run_dir):
    assert main(["train", f"--workdir={run_dir}t"]) == 2
    assert "did you mean" in complaint(capsys)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("typed wrong"), 2, "attnlab: typed wrong"),
        (DataError("damaged"), 3, "attnlab: damaged"),
        (KeyError("x"), 1, "this is a bug in attnlab: KeyError: 'x' (main.py:"),
        (ValueError(""), 1, "ValueError: no message"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"), 2, "optimizer.accumulate"),
        (MemoryError(), 2, "attnlab plan"),
        (OSError(28, "No space left on device"), 3, "No space left on device; free or choose"),
        (OSError(9, "Bad file descriptor"), 1, "this is a bug in attnlab: OSError"),
        (KeyboardInterrupt(), 130, "attnlab: interrupted"),
    ],
)
def test_errors_map_to_exit_codes_and_one_line(capsys, monkeypatch, error, code, message):
    def fails(line):
        raise error

    monkeypatch.setitem(COMMANDS, "list", Command(fails, "", {}))
    assert main(["list"]) == code
    assert message in complaint(capsys)


@pytest.mark.parametrize(
    ("leaving", "code"), [(143, 143), (0, 0), (None, 0), ("message", 1), (130, 130)]
)
def test_a_handled_signal_keeps_its_exit_code(monkeypatch, leaving, code):
    def leaves(line):
        raise SystemExit(leaving)

    monkeypatch.setitem(COMMANDS, "list", Command(leaves, "", {}))
    assert main(["list"]) == code


def test_the_traceback_is_printed_only_with_debug(capsys, monkeypatch):
    def fails(line):
        raise UserError("typed wrong")

    monkeypatch.setitem(COMMANDS, "list", Command(fails, "", {}))
    assert main(["list", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("attnlab 0.")
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in COMMANDS)
    for name, command in COMMANDS.items():
        assert main([name, "--help"]) == 0
        assert main(["help", name]) == 0
        out = capsys.readouterr().out
        assert all(f"--{flag}" in out for flag in command.flags)
        assert all(len(line) <= 100 for line in out.splitlines())


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from attnlab.main import main; main(['--help']); main(['train', '--help']); "
        "heavy = {'jax', 'numpy', 'flax', 'ml_collections', 'tensorflow_datasets'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reader_that_leaves_early_is_no_error():
    code = "import sys; from attnlab.main import main; sys.exit(main(['list', 'mechanisms']))"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.close()
    _, err = child.communicate()
    assert (child.returncode, err) == (141, b"")
