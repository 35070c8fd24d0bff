"""One command trains every entry, survives what fails, stops cleanly, goes on, and reports."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import home, tiny

from attnlab.comparison import measure_speed
from attnlab.config import to_json
from attnlab.files import read_json
from attnlab.main import main
from attnlab.scoreboard import failures, format_table, markdown, sections, table_rows, write

FILE = """
from dataclasses import dataclass
from attnlab.errors import UserError
from attnlab.mechanisms.softmax import Softmax
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Bad(Softmax):
    def __call__(self, *args, **options):
        {what}
"""
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compared():
    """(workdir, exit codes of the stopped and of the next start, its output): one entry is
    sound, one is refused, and the process of the third dies."""
    folder = home() / "comparison"
    folder.mkdir()
    config = folder / "config.json"
    config.write_text(to_json(tiny("task.length=64", "optimizer.ema=0")))
    for name, what in {
        "refusing": "raise UserError('this has no meaning')",
        "dying": "raise RuntimeError('one line')",
    }.items():
        (folder / f"{name}.py").write_text(FILE.format(what=what))
    line = [
        "compare",
        f"--config={config}",
        f"--attention={folder}/refusing.py,narrow=window,{folder}/dying.py",
        "--config.attention.narrow.window=4",
        f"--workdir={folder}/all",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".jax_cache")
    start = [sys.executable, "-m", "attnlab", *line]
    stopped = subprocess.Popen(start, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "all" / "narrow" / "config.json").exists():
        assert stopped.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    first = stopped.wait(120)
    partial = read_json(folder / "all" / "comparison.json")
    again = subprocess.run(start, env=environment, capture_output=True, text=True, check=False)
    return folder / "all", (first, again.returncode), partial, again.stdout + again.stderr


@pytest.mark.slow
def test_a_signal_stops_it_and_the_same_command_goes_on(compared):
    path, (first, again), partial, _ = compared
    assert first == 128 + signal.SIGTERM
    assert [e["state"] for e in partial["entries"]] == ["refused", "stopped", "pending"]
    assert again == 2
    assert [e["state"] for e in read_json(path / "comparison.json")["entries"]] == [
        "refused",
        "finished",
        "failed",
    ]
    assert len(read_json(path / "narrow" / "run.json")["attempts"]) == 2


def test_what_fails_is_one_line_and_stops_nothing(compared):
    path, _, _, said = compared
    result = read_json(path / "comparison.json")
    refused, _, failed = result["entries"]
    assert refused["reason"] == "this has no meaning"
    assert "RuntimeError: one line" in failed["reason"]
    assert "\n" not in failed["reason"]
    assert "Traceback" not in said
    page, text = ((path / f"comparison.{kind}").read_text() for kind in ("html", "md"))
    for entry in (refused, failed):
        assert entry["reason"] in said
        assert entry["reason"] in text
        assert entry["label"] in page
    assert not (path / "refusing").exists()


def test_all_that_is_promised_is_measured(compared):
    entry = read_json(compared[0] / "comparison.json")["entries"][1]
    assert entry["attention"] == {"name": "window", "window": 4, "sinks": 0}
    for name in ("parameters", "attention_flops", "matmul_flops", "decoding_bytes", "peak_bytes"):
        assert entry[name] > 0
    assert entry["tokens_per_second"] > 0
    assert entry["growth"] == {"time": 1, "memory": 1, "state": 0}
    for split in ("validation", "test"):
        assert 0 < entry[split]["bits_per_byte"] < 10
    assert "bits_per_byte_95" in entry["test"]
    assert [row["low"] for row in entry["test"]["loss_by_context"]] == [0, 1, 2, 4, 8, 16, 32]
    assert [row["distance"] for row in entry["needle"]["distances"]] == [16, 47]


def test_an_entry_is_an_ordinary_run(compared, capsys):
    path = compared[0]
    assert main(["report", str(path / "narrow")]) == 0
    assert "narrow" in capsys.readouterr().out
    result = read_json(path / "comparison.json")["entries"][1]
    assert result["test"]["bits_per_byte"] == read_json(path / "narrow/test.json")["bits_per_byte"]
    assert (path / "narrow" / "report.html").exists()


def test_the_report_is_whole_and_needs_nothing_else(compared):
    path = compared[0]
    page = (path / "comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not any(scheme in page for scheme in ("http:", "https:"))  # base64 has no colon
    for name in ("comparison", "costs", "context", "recall"):
        assert (path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert markdown(read_json(path / "comparison.json")) == (path / "comparison.md").read_text()


def test_what_a_page_shows_is_never_run(compared, tmp_path):
    result = read_json(compared[0] / "comparison.json")
    result["entries"][0]["reason"] = result["entries"][1]["label"] = "<script>alert(1)</script>|"
    write(result, tmp_path)
    assert "<script" not in (tmp_path / "comparison.html").read_text()
    assert "&#124; |" in markdown(result)


def test_the_experiment_is_written_from_the_report(compared):
    folder = ROOT / "experiments" / "article_comparison"
    spec = importlib.util.spec_from_file_location("record", folder / "record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.record(compared[0], "2 cores")
    assert str(home()) not in json.dumps(result["environment"])
    text = module.page((folder / "README.md").read_text(), {"cpu": result, "gpu": None})
    assert "| narrow | " in text
    assert "(../../docs/images/comparison_cpu.png)" in text
    assert module.page(text, {"cpu": result, "gpu": None}) == text
    said = module.outside(result, {"bits_per_byte": [0, 0.1]})
    assert [line.partition(":")[0] for line in said] == ["refusing", "narrow", "dying"]
    assert len(module.outside(result, {"bits_per_byte": [0, 10]})) == 2


def test_who_sees_further_has_more_columns(compared):
    result = read_json(compared[0] / "comparison.json")
    further = json.loads(json.dumps(result["entries"][1])) | {"label": "further"}
    rows = further["test"]["loss_by_context"]
    rows.append(rows[-1] | {"low": 64, "high": 128})
    result["entries"].append(further)
    context = sections(result)[0]
    assert [row[-1] for row in context.rows] == ["–", f"{rows[-1]['bits_per_token']:.3f}"]
    assert {len(row) for row in context.rows} == {len(context.head)}


def test_a_comparison_of_nothing_finished_is_still_a_report(compared, tmp_path):
    result = read_json(compared[0] / "comparison.json")
    result["entries"] = [e for e in result["entries"] if e["state"] != "finished"]
    write(result, tmp_path)
    assert table_rows(result) == []
    assert len(failures(result)) == 2
    assert "this has no meaning" in format_table(result)


def test_the_speed_is_that_of_steps_and_not_of_pauses():
    times = [0, 60, 61, 62, 63, 90, 91, 92]  # compiles before the second, pauses before the sixth
    rows = [{"step": s, "time": t, "train/loss": 1.0} for s, t in enumerate(times, 1)]
    rows.insert(3, {"step": 3, "time": 62.5, "validation/bits_per_byte": 2.0})
    assert measure_speed(rows, 100) == 100
    assert measure_speed(rows[:2], 100) is None
    assert measure_speed([], 100) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--workdir=w --config=configs/lm.py", "compare needs --attention"),
        ("--attention=softmax --config=configs/lm.py", "compare needs --workdir"),
        ("--attention=softmax --workdir=w", "compare needs --config"),
        ("--attention=sofmax --workdir=w --config=configs/lm.py", "did you mean 'softmax'"),
        (
            "--attention=softmax --workdir=w --config=configs/lm.py --config.attention=window",
            "ENTRY",
        ),
        ("--attention=softmax --workdir=w --config=configs/lm.py --config.sed=1", "'seed'"),
    ],
)
def test_a_typed_mistake_is_one_line_before_anything_is_trained(capsys, tmp_path, line, message):
    words = [
        word.replace("=w", f"={tmp_path}/w") if "workdir" in word else word for word in line.split()
    ]
    assert main(["compare", *words]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "w").exists()


def test_a_single_run_is_not_compared_into(compared, tmp_path, capsys):
    run = shutil.copytree(compared[0] / "narrow", tmp_path / "run")
    line = ["--attention=softmax", f"--config={run}/entry.json", f"--workdir={run}"]
    assert main(["compare", *line]) == 2
    assert "holds a single run" in capsys.readouterr().err
    assert json.loads((run / "run.json").read_text())["finished"]
