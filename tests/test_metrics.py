"""Nothing measured is lost, doubled or torn; nothing about logging can stop a run."""

import json
import math
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import attnlab
from attnlab.errors import DataError, UserError
from attnlab.metrics import Writer, read_metrics

ROOT = Path(attnlab.__file__).parents[1]


def write_steps(directory, steps, resume=None):
    with Writer(directory, resume, sinks=()) as writer:
        for step in steps:
            writer.write(step, loss=step / 2)


def steps(directory):
    return [row["step"] for row in read_metrics(directory / "metrics.jsonl")]


def test_a_line_holds_step_time_and_every_scalar(tmp_path):
    with Writer(tmp_path, sinks=()) as writer:
        writer.write(3, loss=jnp.float32(0.5), count=np.int64(7), kind="eval", **{"eval/x": 1})
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row.pop("time") > 1e9
    assert row == {"step": 3, "loss": 0.5, "count": 7, "kind": "eval", "eval/x": 1}


def test_nan_and_infinity_are_valid_json_and_come_back(tmp_path):
    with Writer(tmp_path, sinks=()) as writer:
        writer.write(0, a=math.nan, b=-math.inf, c=jnp.inf)

    def refuse(name):
        raise ValueError(name)

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (-math.inf, math.inf)


def test_a_resumed_run_measures_nothing_twice(tmp_path):
    write_steps(tmp_path, range(10))
    write_steps(tmp_path, range(6, 12), resume=5)
    assert steps(tmp_path) == list(range(12))


def test_resuming_before_the_first_step_starts_over_and_none_appends(tmp_path):
    write_steps(tmp_path, range(4))
    write_steps(tmp_path, [9])
    assert steps(tmp_path) == [0, 1, 2, 3, 9]
    write_steps(tmp_path, [0], resume=-1)
    assert steps(tmp_path) == [0]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"\x00\xff", b'{"step": 2', b"{}", b"7"])
def test_a_torn_last_line_is_repaired(tmp_path, torn):
    write_steps(tmp_path, [0, 1])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert steps(tmp_path) == [0, 1]
    write_steps(tmp_path, [2])
    assert steps(tmp_path) == [0, 1, 2]
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 3


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path):
    write_steps(tmp_path, [0, 1])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write_steps(tmp_path, [2])
    assert steps(tmp_path) == [0, 1, 2]


def test_every_line_is_on_disk_when_write_returns(tmp_path):
    writer = Writer(tmp_path, sinks=())
    writer.write(1, loss=1.0)
    assert steps(tmp_path) == [1]
    writer.close()
    writer.close()


def test_what_is_not_a_number_is_a_bug(tmp_path):
    with Writer(tmp_path, sinks=()) as writer:
        with pytest.raises(TypeError, match="'loss' is not a number"):
            writer.write(1, loss=jnp.zeros(2))
        with pytest.raises(ValueError, match="'time' is taken"):
            writer.write(1, time=3)


def test_a_full_disk_is_a_data_error_and_the_torn_line_is_repaired_later(tmp_path):
    code = """
        import resource, sys
        from attnlab.errors import DataError
        from attnlab.metrics import Writer
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with Writer(sys.argv[1], sinks=()) as writer:
            try:
                for step in range(1000):
                    writer.write(step, loss=0.5)
            except DataError as error:
                print(error)
                sys.exit(error.code)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert "cannot write" in done.stdout
    kept = steps(tmp_path)
    assert kept == list(range(len(kept)))
    write_steps(tmp_path, [99])
    assert steps(tmp_path) == [*kept, 99]


def test_a_directory_that_cannot_be_made_is_a_data_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write metrics"):
        Writer(tmp_path / "file", sinks=())
    with pytest.raises(DataError, match="cannot read"):
        read_metrics(tmp_path / "none.jsonl")


def test_other_processes_write_nothing(tmp_path):
    with Writer(tmp_path, process=1) as writer:
        writer.write(1, loss=1.0)
        writer.flush()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_numbers(tmp_path):
    with Writer(tmp_path, sinks=("tensorboard",), config={"lr": 0.1}) as writer:
        writer.write(1, loss=0.25, kind="eval")
        writer.flush()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    assert b"loss" in content
    assert b'"lr": 0.1' in content


def test_an_unknown_sink_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match="'tensorbord'; did you mean 'tensorboard'"):
        Writer(tmp_path, sinks=("tensorbord",))


def test_wandb_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'attnlab\[wandb\]'"):
        Writer(tmp_path, sinks=("wandb",))


def test_wandb_continues_its_run_after_a_restart(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, scalars, step):
            calls.append((step, scalars))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        with Writer(tmp_path, sinks=("wandb",), config={"lr": 1}) as writer:
            writer.write(4, loss=0.5)
    first, wrote, ended, second, *_ = calls
    assert (wrote, ended) == ((4, {"loss": 0.5}), "finish")
    assert first["id"] == second["id"]
    assert (first["config"], first["resume"]) == ({"lr": 1}, "allow")
