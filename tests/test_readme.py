"""What the README says can be typed, run and read as it stands."""

import importlib.util
import json
import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest

from attnlab import errors
from attnlab.commands import COMMANDS
from attnlab.flags import parse_line
from attnlab.limits import validate
from attnlab.overrides import load, load_sweep, override

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "experiments" / "quickstart" / "results.json"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Every ``attnlab ...`` of the pages: lines of shell blocks, and inline code with a flag."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shell = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
        found += re.findall(r"^attnlab .*", shell, re.MULTILINE)
        found += re.findall(r"`(attnlab (?:list|data|train|evaluate|generate|report) [^`]*)`", text)
    return list(dict.fromkeys(found))


@lru_cache
def refresh():
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "docs" / "refresh.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", refresh().PAGES, ids=lambda page: page.name)
def test_tables_and_example_are_what_the_code_says(page):
    text = page.read_text(encoding="utf-8")
    assert refresh().refreshed(text) == text, "run: python docs/refresh.py"


def test_every_table_stands_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in refresh().PAGES)
    assert all(f"<!-- {name} -->\n" in text for name in refresh().parts())
    assert text.count("<!-- /") == len(refresh().parts())


def test_a_recorded_run_becomes_a_row():
    run = {
        "command": "attnlab train --config=configs/quickstart.py --workdir=runs/quickstart",
        "hardware": "2 cores",
        "versions": {"jax": "0.10.2"},
        "seconds": 90,
        "test_bits_per_byte": 2.0004,
        "baselines": {"xz -9e": {"alone": 3.0, "after_train": 2.5}},
    }
    row = refresh().result_table({"quickstart": run, "laptop": None}).splitlines()[-1]
    assert row == f"| `{run['command']}` | 2.000 | xz -9e 2.500 | 1.5 min | 2 cores, jax 0.10.2 |"


def write_claim(folder: Path, **changes) -> None:
    claim = {
        "paper": "Somebody et al., Something",
        "arxiv": "2000.00001",
        "claim": "it finds more",
        "published": "90 %",
        "source": "table 1",
        "ours": "{:.1%} of 8",
        "values": [["rows", {"name": "it"}, "found"]],
        "bands": [[0.7, 0.8]],
        "verdict": "not reproduced",
        "why": "it did not",
    }
    results = {
        "command": "python x.py",
        "hardware": "a core",
        "rows": [{"name": "it", "found": 0.75}],
    }
    (folder / "some").mkdir(exist_ok=True)
    expected = {"replications": [claim | changes]}
    for name, value in (("expected", expected), ("results", results)):
        (folder / "some" / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


def test_what_was_measured_stands_beside_what_was_published(tmp_path):
    write_claim(tmp_path)
    found = refresh().replications(tmp_path)
    text = refresh().replication_sections(found)
    for row in (
        "published | 90 % (table 1)",
        "ours | 75.0 % of 8",
        "verdict | **not reproduced**: it did not",
    ):
        assert f"| {row} |" in text
    assert "| it finds more | `some` |" in refresh().replication_table(found)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bands": [[0.8, 0.9]]}, "0.75 not in 0.8..0.9"),
        ({"bands": []}, "zip"),
        ({"verdict": "nearly"}, "no verdict 'nearly'"),
    ],
)
def test_a_verdict_that_does_not_hold_is_refused(tmp_path, changes, said):
    write_claim(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(said)):
        refresh().replications(tmp_path)


@pytest.mark.parametrize("command", commands())
def test_every_command_can_be_typed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, name, *words = shlex.split(command)
    line = parse_line(name, COMMANDS[name], words)
    file = line.flags.get("config")
    configs = [] if file is None else load_sweep(file) if name == "sweep" else [load(file)]
    for config in configs:
        for path, text in line.overrides:
            override(config, path, text)
        validate(config)


def test_every_exit_code_has_a_row():
    codes = {thing.code for thing in vars(errors).values() if hasattr(thing, "code")}
    assert len(codes) == 4
    assert codes <= set(map(int, re.findall(r"^\| (\d+) \|", README, re.MULTILINE)))


def test_there_are_commands_to_check():
    assert {shlex.split(c)[1] for c in commands()} == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    for link in links:
        assert (page.parent / link).exists(), link
    for path in re.findall(r"\b(?:attnlab|configs|docs|experiments|tests)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_is_named_exists(page):
    named = re.findall(r"`(tests/[\w/]+\.py) -k (\w+)`", page.read_text(encoding="utf-8"))
    for file, word in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def (test|check)_\w*{word}", text, re.MULTILINE), (file, word)


def test_python_blocks_run():
    examples = [block for block in blocks("python") if "@register" not in block]
    assert len(examples) == 2
    for block in examples:
        names: dict = {}
        exec(compile(block, "README.md", "exec"), names)
        if "get_config" in names:
            validate(names["get_config"]("attention=window"))
        else:
            assert names["gradient"].shape == names["q"].shape


def test_the_test_command_is_the_one_that_is_run_here():
    command = "pip install -e '.[test]' && pytest"
    assert f"```sh\n{command}\n```" in README
    assert f"  {command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
