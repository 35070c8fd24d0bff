"""What is recorded in experiments/ is what its expected.json asks for."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments"


def read(name: str, file: str) -> dict:
    return json.loads((FOLDER / name / file).read_text(encoding="utf-8"))


def load(name: str, file: str, monkeypatch):
    """A script of an experiment, as a module; scripts beside it can be imported."""
    monkeypatch.syspath_prepend(str(FOLDER / name))
    spec = importlib.util.spec_from_file_location(f"{name}_{Path(file).stem}", FOLDER / name / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["conscious", "lookup", "planted"])
def test_measured_numbers_lie_in_their_bands(name, monkeypatch):
    module = load(name, "measure.py", monkeypatch)
    assert module.outside(read(name, "results.json"), read(name, "expected.json")) == []


def test_dilution_lies_in_its_bands(monkeypatch):
    module = load("dilution", "measure.py", monkeypatch)
    rows, expected = read("dilution", "results.json")["rows"], read("dilution", "expected.json")
    assert module.outside(rows, expected["bands"]) == []


def test_a_shared_sequence_is_what_was_expected(monkeypatch):
    module = load("sequence_parallel", "measure.py", monkeypatch)
    rows = read("sequence_parallel", "results.json")["rows"]
    assert module.outside(rows, read("sequence_parallel", "expected.json")) == []


@pytest.mark.parametrize(
    "name",
    [
        "capacity",
        "context",
        "deconstructed",
        "extrapolation",
        "hyper",
        "in_context_regression",
        "magnitude_linear",
        "mqar",
        "needle",
        "ntk",
        "pointer",
        "rcmha",
        "recall",
        "sea",
    ],
)
def test_claims_hold(name, monkeypatch):
    module = load(name, "measure.py", monkeypatch)
    results, claims = read(name, "results.json"), read(name, "expected.json")["claims"]
    found = next(
        results[key]
        for key in ("models", "bits_per_byte", "rows", "rules", "modes")
        if key in results
    )
    for claim in claims:
        assert module.held(claim, found), claim


@pytest.mark.parametrize("name", ["anchor", "power", "routing", "sinks", "titans"])
def test_claims_about_all_results_hold(name, monkeypatch):
    module = load(name, "measure.py", monkeypatch)
    results, claims = read(name, "results.json"), read(name, "expected.json")["claims"]
    assert claims
    for claim in claims:
        assert module.held(claim, results), claim


def test_the_arena_lies_in_its_bands_and_its_tables_are_what_was_measured(monkeypatch):
    module = load("long_range_arena", "measure.py", monkeypatch)
    runs = read("long_range_arena", "results.json")["runs"]
    expected = read("long_range_arena", "expected.json")
    assert module.outside(runs, expected) == []
    assert module.outside(runs, {"accuracy": {}}), "a run without a band is no claim"
    text = module.README.read_text(encoding="utf-8")
    assert module.written(text, runs, expected) == text
    assert module.tables(runs, expected) in text


def test_every_twin_trains_in_one_sitting(monkeypatch):
    module = load("twins", "measure.py", monkeypatch)
    twins, expected = read("twins", "results.json")["twins"], read("twins", "expected.json")
    assert module.outside(twins, expected) == []
    assert len(module.outside({}, expected)) == len(twins)


def test_compared_runs_lie_in_their_bands(monkeypatch):
    module = load("article_comparison", "record.py", monkeypatch)
    recorded = {k: v for k, v in read("article_comparison", "results.json").items() if v}
    assert recorded
    for name, result in recorded.items():
        assert module.outside(result, read("article_comparison", "expected.json")[name]) == []


def test_benchmarks_are_not_slower_than_promised(monkeypatch):
    module = load("benchmarks", "record.py", monkeypatch)
    rows, bands = read("benchmarks", "results.json"), read("benchmarks", "expected.json")
    assert module.outside(rows, bands) == []
    assert module.written(rows) == module.TABLES.read_text(encoding="utf-8")
    assert module.outside(rows, [{**bands[0], "at_most": 0.0}])


def test_every_folder_says_what_it_holds():
    folders = sorted(each.name for each in FOLDER.iterdir() if (each / "README.md").is_file())
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in folders:
        assert f"[{name}]({name}/README.md)" in index
        assert (FOLDER / name / "results.json").is_file()
