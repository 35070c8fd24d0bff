"""A list of configs is trained point by point, survives what fails, stops cleanly and goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny import tiny

from attnlab import children
from attnlab.config import base, to_json
from attnlab.errors import DataError, UserError
from attnlab.files import read_json
from attnlab.limits import validate
from attnlab.main import main
from attnlab.overrides import load, load_sweep, override
from attnlab.points import make_points, shorten
from attnlab.slurm import MARK, array_of
from attnlab.sweep import sweep
from attnlab.sweep_table import collect, failures, format_table, markdown, page, table_rows

ROOT = Path(__file__).parents[1]
STAND_IN = """
import json, pathlib, signal, sys, time

given = dict(word[2:].split("=", 1) for word in sys.argv[2:])
folder = pathlib.Path(given["workdir"])
config = json.loads(pathlib.Path(given["config"]).read_text())
rate = config["optimizer"]["learning_rate"]
(folder / "config.json").write_text(json.dumps(config))
with open(folder / "starts", "a") as file:
    file.write("x")
if rate == 0.5:
    print("attnlab: step 3: loss nan", file=sys.stderr)
    sys.exit(2)
if rate == 0.25 and (folder / "starts").read_text() == "x":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (folder / "waits").touch()
    time.sleep(60)
for split, bits in {"validation": rate, "test": 1 - rate}.items():
    score = {"step": 12, "bits_per_byte": bits, "bits_per_byte_95": [bits / 2, 2 * bits]}
    (folder / f"{split}.json").write_text(json.dumps(score | {"length": 32}))
rows = [{"step": s, "time": s * 2.0, "train/loss": 1.0} for s in range(5)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "run.json").write_text(json.dumps({"finished": {"step": 12}, "attempts": []}))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """In place of training, a program that waits, fails or finishes as the learning rate says."""
    (tmp_path / "program.py").write_text(STAND_IN)
    monkeypatch.setattr(children, "PROGRAM", (sys.executable, "-S", str(tmp_path / "program.py")))
    return tmp_path / "sweep"


def changed(*changes, attention="softmax"):
    config = base(attention)
    for change in changes:
        override(config, *change.split("=", 1))
    return config


def rates(*values):
    return [changed(f"optimizer.learning_rate={value}") for value in values]


def starts(folder):
    return {path.parent.name: len(path.read_text()) for path in folder.glob("*/starts")}


def test_a_point_is_named_by_what_differs_whatever_the_order():
    configs = [
        changed("optimizer.learning_rate=0.1"),
        changed("optimizer.learning_rate=0.1", "attention.window=8", attention="window"),
        changed("optimizer.learning_rate=0.1", "attention.window=9", attention="window"),
        changed("optimizer.learning_rate=1e-5"),
    ]
    names = [
        "attention=softmax,learning_rate=0.1",
        "attention=window,window=8,learning_rate=0.1",
        "attention=window,window=9,learning_rate=0.1",
        "attention=softmax,learning_rate=1e-05",
    ]
    assert [point.folder for point in make_points(configs)] == names
    assert [point.folder for point in make_points(configs[::-1])] == names[::-1]
    assert make_points(configs)[0].values == {"learning_rate": 0.1, "attention": "softmax"}
    assert make_points(configs[:1])[0].folder == "only"


def test_names_that_would_be_shared_are_whole():
    assert shorten(["attention.base", "position.base", "position.name", "seed"]) == {
        "attention.base": "attention.base",
        "position.base": "position.base",
        "position.name": "position",
        "seed": "seed",
    }


def test_no_two_points_share_a_directory_and_none_leaves_the_workdir():
    texts = ["a b", "a/b", "a-b", "A-b", "../x", "ä" * 300, "b" * 300, "b" * 301, ""]
    folders = [p.folder for p in make_points([changed(f"sample.prompt={t}") for t in texts])]
    assert len(set(folders)) == len({folder.lower() for folder in folders}) == len(texts)
    assert all(re.fullmatch(r"prompt=[\w.=-]{0,120}", folder, re.ASCII) for folder in folders)


def test_every_point_is_trained_ranked_by_validation_and_what_fails_stops_nothing(stand_in, capsys):
    configs = rates(0.125, 0.5, 0.0625, 0.75)
    assert sweep(configs, stand_in, workers=2) == 2
    said = capsys.readouterr()
    result = collect(stand_in)
    best = [row[:4] for row in table_rows(result)]
    assert best == [
        ["0.0625", "0.0625", "0.9375", "0.469 to 1.875"],
        ["0.125", "0.1250", "0.8750", "0.438 to 1.750"],
        ["0.75", "0.7500", "0.2500", "0.125 to 0.500"],
    ]
    assert failures(result) == [["0.5", "failed", "step 3: loss nan"]]
    for text in (said.out, (stand_in / "sweep.md").read_text()):
        assert "learning_rate" in text
        assert "step 3: loss nan" in text
    assert "  learning_rate=0.5: attnlab: step 3: loss nan" in said.err.splitlines()
    assert "3 of 4 points" in (stand_in / "sweep.html").read_text()
    assert sweep(configs, stand_in) == 2
    assert starts(stand_in) == {
        "learning_rate=0.125": 1,
        "learning_rate=0.5": 2,
        "learning_rate=0.0625": 1,
        "learning_rate=0.75": 1,
    }


def test_a_signal_stops_all_children_and_the_same_command_goes_on(stand_in):
    configs = rates(0.25, 0.125, 0.0625)

    over = threading.Event()

    def interrupt():
        while not over.wait(0.01):
            if list(stand_in.glob("*/waits")):
                return os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code = sweep(configs, stand_in)
    over.set()
    thread.join()
    assert code == 143
    assert [p["state"] for p in collect(stand_in)["points"]] == ["stopped", "pending", "pending"]
    assert sweep(configs, stand_in, workers=3) == 0
    assert [p["state"] for p in collect(stand_in)["points"]] == ["finished"] * 3
    assert starts(stand_in)["learning_rate=0.25"] == 2
    assert not list(stand_in.rglob("*.tmp"))


def test_the_report_is_that_of_the_workdir_as_it_is(stand_in, capsys):
    assert sweep(rates(0.125, 0.5), stand_in) == 2
    run = stand_in / "learning_rate=0.125"
    capsys.readouterr()
    assert main(["report", str(stand_in), f"--out={stand_in}/table.html"]) == 0
    assert "0.1250" in capsys.readouterr().out
    assert "<td>0.5</td><td>failed</td>" in (stand_in / "table.html").read_text()
    assert main(["report", str(stand_in), f"--out={stand_in}/table.png"]) == 2
    assert main(["report", str(stand_in), str(run)]) == 2
    assert "report it by itself" in capsys.readouterr().err
    # A point that was trained by other means is found; one whose files are damaged is named.
    failed = stand_in / "learning_rate=0.5"
    for name in ("run.json", "test.json", "validation.json", "metrics.jsonl"):
        (failed / name).write_bytes((run / name).read_bytes())
    (run / "test.json").write_text("{")
    result = collect(stand_in)
    assert [p["state"] for p in result["points"]] == ["failed", "finished"]
    assert "test.json" in failures(result)[0][2]
    assert "\n" not in failures(result)[0][2]
    (failed / "config.json").write_text(to_json(base("window")))
    assert "another config" in format_table(collect(stand_in))
    (stand_in / "sweep.json").write_text('{"points": 3}')
    with pytest.raises(DataError, match="the same attnlab sweep writes it anew"):
        collect(stand_in)


def test_what_a_page_shows_is_never_run():
    point = {"values": {"prompt": "<script>|"}, "state": "failed", "reason": "<b>"}
    result = {"command": ["<i>"], "fields": ["prompt"], "shared": {"x": "<u>"}, "points": [point]}
    text = "\n".join(page(result))
    assert not re.search("<(script|b|i|u)>", text)
    assert "<script>&#124;" in markdown(result)


def test_a_script_for_a_job_array_trains_the_points_that_are_left(stand_in, capsys):
    configs = rates(0.125, 0.0625, 0.75)
    assert sweep(configs, stand_in, slurm=True) == 0
    script = stand_in / "sweep.sbatch"
    assert f"sbatch --array=0-2 {script}" in capsys.readouterr().out.splitlines()
    assert starts(stand_in) == {}
    edited = script.read_text().replace("04:00:00", "08:00:00")
    script.write_text(edited)
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "1"}
    subprocess.run(["bash", script], check=True, env=environment)
    assert starts(stand_in) == {"learning_rate=0.0625": 1}
    assert sweep(configs, stand_in, slurm=True) == 0
    assert f"sbatch --array=0,2 {script}" in capsys.readouterr().out.splitlines()
    assert script.read_text() == edited
    script.write_text(edited.replace(MARK, ""))
    with pytest.raises(UserError, match="has lost the line"):
        sweep(configs, stand_in, slurm=True)


def test_an_array_is_written_as_spans():
    assert array_of([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert array_of([3]) == "3"


SWEEP = """
from attnlab.config import base
def get_config():
    configs = [base() for _ in range(3)]
    for number, config in enumerate(configs):
        config.seed = number
    return {what}
"""


@pytest.mark.parametrize(
    ("what", "line", "message"),
    [
        ("configs", "", "sweep needs --workdir"),
        ("configs", "--workdir=w --config=x.py", "takes one file"),
        ("configs", "--workdir=w --workers=0", "--workers=0: must be at least 1"),
        ("configs", "--workdir=w --config.sed=1", "'seed'"),
        ("configs", "--workdir=w --config.seed=1", "configs 1 and 2 of the sweep are the same"),
        ("configs[:1] * 2", "--workdir=w", "configs 1 and 2 of the sweep are the same"),
        ("[]", "--workdir=w", "has no configs"),
        ("configs[0]", "--workdir=w", "must return a list of configs"),
        ("[configs[0], 3]", "--workdir=w", "returned int, not a config"),
    ],
)
def test_a_typed_mistake_is_one_line_before_anything_is_made(
    tmp_path, capsys, monkeypatch, what, line, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "many.py").write_text(SWEEP.format(what=what))
    assert main(["sweep", "many.py", *line.split()]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said
    assert not (tmp_path / "w").exists()


def test_a_sweep_is_no_config_of_one_run(tmp_path):
    (tmp_path / "many.py").write_text(SWEEP.format(what="configs"))
    with pytest.raises(UserError, match="is a sweep of 3 configs; attnlab sweep runs it"):
        load(str(tmp_path / "many.py"))


def test_a_single_run_is_not_swept_into(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a single run"):
        sweep(rates(1, 2), tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.py")))
def test_what_is_shipped_can_be_trained(path):
    points = make_points(load_sweep(str(path)))
    assert len({point.folder for point in points}) == len(points) > 1
    for point in points:
        validate(point.config)


@pytest.mark.slow
def test_real_runs_are_points(tmp_path, capsys):
    paths = [tmp_path / f"{seed}.json" for seed in range(2)]
    for seed, path in enumerate(paths):
        path.write_text(to_json(tiny(f"seed={seed}")))
    lines = "from attnlab.overrides import load\ndef get_config():\n    return "
    listed = ", ".join(f"load({str(path)!r})" for path in paths)
    (tmp_path / "many.py").write_text(f"{lines}[{listed}]\n")
    line = ["sweep", f"--config={tmp_path}/many.py", f"--workdir={tmp_path}/all", "--workers=2"]
    assert main(line) == 0
    assert len(table_rows(collect(tmp_path / "all"))) == 2
    assert read_json(tmp_path / "all" / "seed=1" / "run.json")["finished"]["step"] == 12
    assert main(line) == 0
    assert len(read_json(tmp_path / "all" / "seed=1" / "run.json")["attempts"]) == 1
    assert json.loads((tmp_path / "all" / "sweep.json").read_text())["fields"] == ["seed"]
