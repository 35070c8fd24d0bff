"""What a run leaves to be read is whole, safe to open and honest about what it compares."""

import json
import math
import re
import shutil

import pytest
from tiny import tiny, trained

from attnlab.files import read_json, write_json
from attnlab.main import main
from attnlab.plots import plot_contexts, plot_training
from attnlab.report import format_baselines, write_report
from attnlab.workdir import Workdir

HOSTILE = b"<script>alert(1)</script> </pre> &amp; \xff\x00 \"'"
BASELINES = {
    "gzip -9": {"alone": 2.5, "after_train": 2.25},
    "bzip2 -9": {"alone": 2.0, "after_train": 1.75},
}


@pytest.fixture
def finished(tmp_path):
    """A copy of a finished run, to be changed."""
    return shutil.copytree(trained(), tmp_path / "a run")


def page_of(path, sample=b"text", baselines=BASELINES):
    results = {split: read_json(path / f"{split}.json") for split in ("validation", "test")}
    write_report(Workdir(path), tiny(), {"corpus": "<b>"}, results, baselines, sample)
    return (path / "report.html").read_text()


def test_a_sample_is_shown_and_never_run(finished):
    page = page_of(finished, HOSTILE)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &lt;/pre&gt; &amp;amp;" in page
    assert "<b></td>" not in page
    assert "&lt;b&gt;" in page


def test_the_page_needs_nothing_but_itself(finished):
    page = page_of(finished)
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"""(src|href)=(?!["']?data:)""", page)
    assert page.count("<table>") == page.count("</table>") == 4


def test_the_page_has_the_model_among_the_compressors(finished):
    page = page_of(finished)
    bits = read_json(finished / "test.json")["bits_per_byte"]
    assert "<td>gzip -9</td><td class=n>2.5000</td><td class=n>2.2500</td>" in page
    assert f"<tr class=own><td>this model</td><td class=n>{bits:.4f}</td>" in page


def test_a_page_without_baselines_or_interval_is_still_a_page(finished):
    test = read_json(finished / "test.json") | {"bits_per_byte_95": None, "word_perplexity": None}
    write_json(finished / "test.json", test)
    assert "this model" in page_of(finished, baselines={})


def test_the_terminal_table_lines_up():
    lines = format_baselines(1.5, BASELINES).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split() == ["this", "model", "1.5000", "1.5000"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "train/bits_per_byte": math.nan}],
        [{"step": 1, "train/bits_per_byte": 3.0}],
        [{"step": s, "train/bits_per_byte": 8 / s, "validation/bits_per_byte": 2} for s in (1, 9)],
    ],
)
@pytest.mark.parametrize("baselines", [None, {"gzip -9": 2.5}])
def test_a_curve_of_any_rows_is_drawn(tmp_path, rows, baselines):
    plot_training({"run": rows}, tmp_path / "loss.png", baselines)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_a_context_curve_of_one_point_is_drawn(tmp_path):
    plot_contexts({"test": [{"low": 0, "high": 1, "bits_per_token": 2.0}]}, tmp_path / "c.png")
    assert (tmp_path / "c.png").exists()


def test_runs_are_compared_best_first(tmp_path, capsys):
    a, b = trained("softmax"), trained("window")
    capsys.readouterr()
    best, worst = sorted((a, b), key=lambda p: read_json(p / "test.json")["bits_per_byte"])
    for out in ("curves.png", "table.md"):
        line = ["report", str(worst), str(best), f"--out={tmp_path / out}"]
        assert main(line) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [row.split()[0] for row in printed[:3]] == ["run", best.name, worst.name]
        assert printed[3] == f"written: {tmp_path / out}"
    assert (tmp_path / "table.md").read_text().splitlines()[1].startswith("| --- |")


def test_scores_of_different_texts_are_said_not_to_compare(finished, capsys):
    write_json(finished / "test.json", read_json(finished / "test.json") | {"length": 64})
    assert main(["report", str(finished), str(trained())]) == 0
    assert "not comparable: the runs differ in length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (lambda p: (p / "config.json").unlink(), 2, "no run in"),
        (lambda p: (p / "test.json").write_text("{"), 3, "no readable result in"),
        (lambda p: (p / "test.json").write_text("[]"), 3, "no readable result in"),
        (lambda p: (p / "run.json").write_text(json.dumps({"finished": None})), 2, "not finished"),
    ],
)
def test_a_run_without_a_result_is_one_line(finished, capsys, spoil, code, message):
    spoil(finished)
    assert main(["report", str(finished)]) == code
    output = capsys.readouterr()
    assert message in output.err.splitlines()[-1]
    assert "Traceback" not in output.err


@pytest.mark.parametrize("out", ["table.csv", "nowhere/table.md", "nowhere/curves.png"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys, out):
    assert main(["report", str(trained()), f"--out={tmp_path / out}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
