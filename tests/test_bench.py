"""`attnlab bench` measures what it says, each subject in a process of its own."""

import json
import os
import signal

import pytest
from tiny import tiny

from attnlab.bench import command, subjects
from attnlab.bench.command import default_config, in_positions, parse_lengths
from attnlab.bench.parent import Stopped, Worker, ratio, timing
from attnlab.bench.tables import filled, growths, slope
from attnlab.config import base, put, to_json
from attnlab.core import mechanisms
from attnlab.errors import UserError
from attnlab.main import main


def small(attention: str = "softmax", position: str = "none"):
    config = tiny(attention=attention, position=position)
    put(config, "task.batch", 2)
    return config


def test_columns_without_an_entry_are_left_out():
    assert filled([["a", "b", "c"], ["1", "", ""], ["", "", "2"]]) == [
        ["a", "c"],
        ["1", ""],
        ["", "2"],
    ]
    assert filled([["a", "b"]]) == [["a", "b"]]


def test_lengths_are_numbers_in_order():
    assert parse_lengths("4k,1024, 3") == [3, 1024, 4096]
    for wrong in ("", "0", "1.5k", "x", "1,,2"):
        with pytest.raises(UserError, match="is no length"):
            parse_lengths(wrong)
    with pytest.raises(UserError, match="more than"):
        parse_lengths(str(2**31))


def test_an_entry_is_measured_in_every_position():
    config = default_config()
    assert [c.position.name for c in in_positions(config, "rope,alibi")] == ["rope", "alibi"]
    assert in_positions(config, "") == [config]
    with pytest.raises(UserError, match="rope"):
        in_positions(config, "rop")


def test_the_exponent_of_a_power_is_that_power():
    x = [1024, 2048, 4096]
    assert slope(x, [3 * n**1.5 for n in x]) == pytest.approx(1.5)


def test_growth_is_read_from_the_last_three_lengths():
    rows = [
        {
            "label": "a",
            "position": "none",
            "length": n,
            "wall": {"median": max(n, 64) ** 2},
            "cpu": {"median": n},
            "above_empty": 0 if n < 64 else n,
        }
        for n in (1, 64, 128, 256)
    ]
    assert growths(rows) == [["a", "none", "N^2.00", "N^1.00", "N^1.00"]]
    assert growths(rows[:3])[0][-1] == "–", "no memory above an empty process has no exponent"
    assert growths(rows[:1]) == []


def test_ratios_are_those_of_calls_that_followed_each_other():
    found = ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert found == pytest.approx((2.0, 2.0, 2.0))
    low_high = ratio([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    assert low_high.low < low_high.median == 2.5 < low_high.high
    assert timing([3.0, 1.0, 2.0]) == (2.0, 1.5, 2.5)


@pytest.mark.parametrize("mode", ["fwd", "fwdbwd", "train", "decode"])
def test_a_call_can_be_made_again_and_again(mode):
    subject = subjects.build(small(), mode, 24)
    for _ in range(2):
        subject.call()
    assert subject.tokens == 2 * (subjects.DRAWN if mode == "decode" else 24)
    assert (subject.flops > 0) == (mode != "decode")
    assert (subject.state > 0) == (mode == "decode")
    assert subject.compiling > 0


def test_a_gradient_counts_three_times_its_forward_pass():
    forward, backward = (subjects.build(small(), mode, 24).flops for mode in ("fwd", "fwdbwd"))
    config = small()
    dims = subjects.architecture_of(config).dims
    assert forward == 2 * mechanisms.get("softmax")().flops(dims, 24, True)
    assert backward == 3 * forward


@pytest.mark.slow
@pytest.mark.parametrize("name", ["han", "switch_head", "routing", "infini"])
def test_what_a_mechanism_reads_beside_is_there(name):
    """Units, the block's input, statistics and a state of its own, also in decoding."""
    for mode in ("fwdbwd", "decode"):
        subjects.build(base_of(name), mode, 24).call()


def base_of(name: str):
    config = base(name, "none")
    for path, value in (("width", 16), ("layers", 1), ("heads", 2), ("kv_heads", 2)):
        put(config, f"model.{path}", value)
    put(config, "task.batch", 1)
    return config


def test_a_pattern_over_layers_needs_a_model():
    with pytest.raises(UserError, match="--mode=train"):
        subjects.build(tiny("model.layers=2", attention="window+softmax"), "fwd", 24)


def test_a_process_answers_for_its_subject_and_for_its_mistakes():
    asked = {"config": json.loads(to_json(small())), "mode": "fwd", "length": 24, "threads": 1}
    with Worker(asked) as worker:
        assert worker.about["tokens"] == 48
        worker.call()
        assert worker.calls[0]["wall"] > 0
        assert worker.calls[0]["peak"] > 2**20
        assert not worker.enough(2)
        worker.process.kill()
        with pytest.raises(Stopped, match="signal 9"):
            worker.call()
    bidirectional = json.loads(to_json(small("linformer")))
    with pytest.raises(UserError, match="linformer"):
        Worker({**asked, "config": bidirectional})


def test_the_command_leaves_rows_a_table_and_a_picture(tmp_path, capsys):
    out = tmp_path / "bench"
    line = ["bench", "--attention=window,linformer", "--lengths=32", "--repeats=1", "--mode=fwd"]
    given = ["--config.task.batch=2", "--config.model.kernels=pallas"]
    assert main([*line, f"--out={out}", *given]) == 2
    shown = capsys.readouterr().out
    assert "window" in shown
    assert "linformer, 32 tokens: attention linformer cannot be causal" in shown
    rows = [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == ["matrix product", "window", "linformer"]
    assert rows[1]["wall"]["median"] > 0
    assert rows[1]["peak"] > 2**20
    served = "attention engine: blockwise (XLA, not Pallas: the device is a cpu, cpu)"
    assert rows[1]["engines"] == [served]
    assert rows[1]["ceiling"] == rows[0]["rate"] > 0
    assert "| window | none | 32 |" in (out / "bench.md").read_text()
    assert (out / "bench.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "wrong",
    [
        ["--mode=fast"],
        ["--lengths=1.5"],
        ["--repeats=0"],
        ["--threads=9999"],
        ["--positions=rop"],
        ["--peers", "--mode=decode"],
        ["--peers", "--mode=train"],
        ["--lengths=9999999k"],
        ["--config.model.heads=3"],
        ["--config.attention.windw.window=3"],
    ],
)
def test_what_cannot_be_measured_is_one_line(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--attention=window", *wrong]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("finished", [0, 1])
def test_a_signal_keeps_what_was_finished(number, finished, tmp_path, monkeypatch, capsys):
    def measure(points, *_):
        for point in points[:finished]:
            yield {"label": point.label, "length": point.length, "error": "too long", "code": 2}
        os.kill(os.getpid(), number)
        raise AssertionError("a stop is no error of one point")

    monkeypatch.setattr(command, "measure", measure)
    before = signal.getsignal(signal.SIGTERM)
    line = ["bench", "--attention=window", "--lengths=32,64", f"--out={tmp_path}"]
    assert main(line) == 128 + number
    assert signal.getsignal(signal.SIGTERM) is before
    lines = (tmp_path / "bench.jsonl").read_text().splitlines()
    assert [json.loads(line)["length"] for line in lines] == [32][:finished]
    assert (tmp_path / "bench.md").exists() == bool(finished)
    assert "too long" in capsys.readouterr().out or not finished


def test_peers_of_which_none_is_installed_are_refused(monkeypatch):
    monkeypatch.setattr(command, "installed", lambda *_: [])
    with pytest.raises(UserError, match="none of lucidrains/linformer is"):
        command.check_peers(["linformer"], "fwd")
    with pytest.raises(UserError, match="no package is known"):
        command.check_peers(["capsule"], "fwd")


def test_what_does_not_fit_into_memory_is_an_error_of_one_line():
    config = json.loads(to_json(small()))
    with pytest.raises(UserError, match=r"^out of memory: .*\d{12} bytes"):
        Worker({"config": config, "mode": "product", "length": 2**20, "threads": 1})
