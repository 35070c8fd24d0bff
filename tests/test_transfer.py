"""Parameters leave a run and begin another one to the bit; what does not fit is refused."""

import json
import os

import jax
import numpy as np
import pytest
from tiny import trained

from attnlab.config import base, to_json
from attnlab.errors import DataError, UserError
from attnlab.files import read_json
from attnlab.leaves import flatten_state
from attnlab.main import main
from attnlab.runs import open_run
from attnlab.tensors import open_tensors, write_tensors
from attnlab.transfer import config_of, match
from attnlab.workdir import Workdir


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The parameters of a finished run. Not to be changed."""
    file = tmp_path_factory.mktemp("exported") / "tiny.safetensors"
    assert main(["export", f"--workdir={trained()}", f"--to={file}"]) == 0
    return file


def values(workdir) -> dict[str, bytes]:
    leaves = flatten_state(open_run(workdir).params).items()
    return {path: np.asarray(leaf.value).tobytes() for path, leaf in leaves}


def rewritten(exported, path, change=lambda arrays: None, **metadata):
    """A copy of the file with other arrays or metadata; None takes a text away."""
    source = open_tensors(exported)
    arrays = {name: source.read(name) for name in source.specs}
    change(arrays)
    texts = {k: v for k, v in (source.metadata | metadata).items() if v is not None}
    write_tensors(path, arrays, texts)
    return path


def complaint(capsys, line, code) -> str:
    assert main(line) == code
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    return said


def test_a_file_says_where_it_comes_from(exported):
    source = open_tensors(exported)
    source.check()
    run = open_run(trained())
    assert config_of(source) == run.config
    assert int(source.metadata["step"]) == run.step == 12
    assert json.loads(source.metadata["versions"])["jax"] == jax.__version__
    assert {name: source.read(name).tobytes() for name in source.specs} == values(trained())


def test_a_run_begins_with_the_parameters_of_a_file(exported, tmp_path, capsys):
    new = tmp_path / "a new run"
    line = ["import", str(exported), f"--workdir={new}", "--config.attention=window"]
    assert main([*line, "--config.attention.window=4"]) == 0
    said = capsys.readouterr().out
    count = len(open_tensors(exported).specs)
    assert f"matched: {count} of {count} parameters" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a new run"]
    assert values(new) == values(trained())
    assert open_run(new).step == 0
    assert (new / "command.txt").read_text().startswith("attnlab import ")
    record = read_json(new / "imported.json")
    assert (record["step"], record["missing"], record["left_over"]) == ("12", [], [])
    assert Workdir.existing(new).config()["attention"]["name"] == "window"
    assert "is not empty; choose a new one" in complaint(capsys, line, 2)


def test_from_there_it_is_a_run_as_any_other(exported, tmp_path):
    new = tmp_path / "new"
    assert main(["import", str(exported), f"--workdir={new}"]) == 0
    assert main(["train", f"--workdir={new}"]) == 0
    assert read_json(new / "run.json")["finished"]["step"] == 12
    # Trained for as long again, on the same text.
    before, after = (read_json(run / "validation.json") for run in (trained(), new))
    assert after["bits_per_byte"] < before["bits_per_byte"]


def test_what_only_one_side_has_needs_to_be_allowed(exported, tmp_path, capsys):
    def change(arrays):
        arrays["extra"] = arrays.pop(next(name for name in arrays if "kernel" in name))

    file, new = rewritten(exported, tmp_path / "part.safetensors", change), tmp_path / "new"
    line = ["import", str(file), f"--workdir={new}"]
    said = complaint(capsys, line, 2)
    assert "missing " in said
    assert "left over extra" in said
    assert "--allow_partial" in said
    assert not new.exists()
    assert main([*line, "--allow_partial"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "left over: extra, which the model does not have" in lines
    (missing,) = read_json(new / "imported.json")["missing"]
    assert f"missing: {missing}, which is as initialised" in lines
    found, before = values(new), values(trained())
    assert [path for path in before if found[path] != before[path]] == [missing]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: array.astype(np.float16), "saved float16"),
        (lambda array: array.astype(np.float64), "saved float64"),
        (lambda array: array[..., :-1], "saved float32["),
    ],
)
def test_nothing_is_cast_or_cut(exported, tmp_path, capsys, change, message):
    def one(arrays):
        name = sorted(arrays)[-1]
        arrays[name] = change(arrays[name])

    file = rewritten(exported, tmp_path / "other.safetensors", one)
    line = ["import", str(file), f"--workdir={tmp_path}/new", "--allow_partial"]
    said = complaint(capsys, line, 2)
    assert message in said
    assert "nothing is cast or cut" in said
    assert not (tmp_path / "new").exists()


def test_a_file_of_another_model_is_refused_even_in_part(tmp_path):
    write_tensors(tmp_path / "w.safetensors", {"theirs": np.zeros(3, np.float32)}, {})
    with pytest.raises(UserError, match="no parameter of the model; it holds theirs"):
        match(open_tensors(tmp_path / "w.safetensors"), flatten_state({"ours": np.zeros(3)}))


def test_weights_that_are_not_finite_are_refused(exported, tmp_path, capsys):
    def poison(arrays):
        name = next(iter(arrays))
        arrays[name] = np.full_like(arrays[name], np.nan)

    file = rewritten(exported, tmp_path / "nan.safetensors", poison)
    said = complaint(capsys, ["import", str(file), f"--workdir={tmp_path}/new"], 3)
    assert "holds NaN or Inf; nothing is imported" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan.safetensors"]


def test_a_damaged_file_is_refused_before_anything_is_made(exported, tmp_path, capsys):
    content = bytearray(exported.read_bytes())
    content[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(content)
    line = ["import", f"{tmp_path}/w.safetensors", f"--workdir={tmp_path}/new"]
    assert "SHA-256 differs" in complaint(capsys, line, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_tokens_of_another_tokenizer_are_refused(exported, tmp_path, capsys):
    file = rewritten(exported, tmp_path / "w.safetensors", tokenizer="0" * 64)
    said = complaint(capsys, ["import", str(file), f"--workdir={tmp_path}/new"], 2)
    assert "another tokenizer" in said
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def edited(**sections) -> str:
    config = json.loads(to_json(base()))
    config["model"]["layers"] = 1
    for name, fields in sections.items():
        config[name] |= fields
    return json.dumps(config)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (None, UserError, "holds no config of attnlab; give --config"),
        ("{", DataError, "cannot be read"),
        ("[]", DataError, "cannot be read"),
        ('{"a":' * 10_000, DataError, "cannot be read: RecursionError"),
        (edited(sample={"prompt": "a" * 70_000}), DataError, "it is too long"),
        (edited(attention={"name": "softmax+/srv/x.py"}), UserError, "no part of attnlab"),
        (edited(attention={"name": "softmax+" * 1_000}), UserError, "no part of attnlab"),
        (edited(attention={"name": "sofmax"}), UserError, "did you mean 'softmax'"),
        (edited(model={"layers": 10**9}), DataError, "asks for sizes"),
        (edited(model={"layers": 2000}), DataError, "asks for sizes"),
        (edited(model={"width": 10**15}), DataError, "asks for sizes"),
        (edited(model={"width": float("nan")}), DataError, "asks for sizes"),
        (edited(model={"layers": "x" * 100}), DataError, "cannot be read"),
        (edited(model={"colour": 3}), UserError, "unknown model.colour"),
    ],
)
def test_a_config_in_a_file_is_not_believed(tmp_path, config, error, message):
    metadata = {} if config is None else {"config": config}
    write_tensors(tmp_path / "w.safetensors", {"a": np.zeros(1)}, metadata)
    with pytest.raises(error, match=message) as caught:
        config_of(open_tensors(tmp_path / "w.safetensors"))
    assert "\n" not in str(caught.value)


def test_an_export_is_whole_or_not_there(tmp_path, capsys, monkeypatch):
    line = ["export", f"--workdir={trained()}"]
    assert "must end in .safetensors" in complaint(capsys, [*line, "--to=w.pt"], 2)
    assert "no directory" in complaint(capsys, [*line, f"--to={tmp_path}/a/w.safetensors"], 2)
    assert "no checkpoint 5" in complaint(
        capsys, [*line, f"--to={tmp_path}/w.safetensors", "--step=5"], 2
    )

    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "w.safetensors").write_bytes(b"older")
    monkeypatch.setattr(os, "fsync", full)
    said = complaint(capsys, [*line, f"--to={tmp_path}/w.safetensors"], 3)
    assert "No space left" in said
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    assert (tmp_path / "w.safetensors").read_bytes() == b"older"


def test_an_import_that_is_stopped_leaves_nothing(exported, tmp_path, monkeypatch):
    def stop(self, *_):
        self.received = 15
        return self

    from attnlab.signals import Signals

    monkeypatch.setattr(Signals, "__enter__", stop)
    assert main(["import", str(exported), f"--workdir={tmp_path}/new"]) == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import", "import needs one file"),
        ("import a.safetensors b.safetensors", "import needs one file"),
        ("import a.safetensors", "import needs --workdir"),
        ("import nothing.safetensors --workdir=w", "no file nothing.safetensors"),
        ("import weights.pt --workdir=w", "convert it to .safetensors"),
        ("import a.safetensors --workdir=w --allow-partial", "did you mean '--allow_partial'"),
        ("export --workdir=w", "export needs --to"),
    ],
)
def test_a_typed_mistake_is_one_line_and_exit_2(capsys, line, message):
    assert message in complaint(capsys, line.split(), 2)
