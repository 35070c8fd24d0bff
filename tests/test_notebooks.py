"""Notebooks run as they are, and what they show came from a run."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_outputs_are_those_of_one_run_from_the_top(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        assert bool(cell["outputs"]) == ("print(" in source(cell)), source(cell)


@pytest.mark.slow
def test_every_cell_runs(path, capsys):
    names: dict = {"__name__": "__main__"}
    for cell in code_cells(path):
        exec(compile(source(cell), path.name, "exec"), names)
        shown = capsys.readouterr().out
        assert bool(shown) == bool(cell["outputs"])
