"""Rewrites what the pages repeat: tables of all that can be chosen, of configs, corpora, results.

python docs/refresh.py

Each stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``; so does the code of ``docs/examples``
that the README shows, and what ``experiments`` found of the claims of papers. A test fails while a
page is not what this would write.
"""

import ast
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnlab import combination
from attnlab.core import mechanisms, normalisers, positions
from attnlab.data.corpora import CORPORA, Source
from attnlab.data.labelled import LABELLED
from attnlab.literals import text_of
from attnlab.tasks import recipes

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "reference.md", ROOT / "docs" / "replications.md")
EXPERIMENTS = ROOT / "experiments"
RESULTS = EXPERIMENTS / "quickstart" / "results.json"
GROWTH = {0.0: "1", 1.0: "N"}
VERDICTS = ("reproduced", "direction only", "not reproduced")


def refreshed(text: str) -> str:
    """``text`` with every marked part written anew. Raises `KeyError` for an unknown mark."""
    known = parts()
    marked = re.compile(r"(<!-- ([a-z]+:[a-z]+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
    return marked.sub(lambda m: f"{m[1]}{known[m[2]]}\n{m[3]}", text)


def parts() -> dict[str, str]:
    """What stands between the markers, by their name."""
    example = (ROOT / "docs" / "examples" / "dilated.py").read_text(encoding="utf-8")
    claims = replications(EXPERIMENTS)
    return {
        "table:mechanisms": mechanism_table(),
        "table:positions": position_table(),
        "table:normalisers": normaliser_table(),
        "table:corpora": corpus_table("task.corpus", CORPORA),
        "table:labelled": corpus_table("task.source", LABELLED),
        "table:configs": config_table("configs"),
        "table:papers": config_table("configs/papers"),
        "table:tasks": task_table(),
        "table:replications": replication_table(claims),
        "papers:replications": replication_sections(claims),
        "table:results": result_table(json.loads(RESULTS.read_text(encoding="utf-8"))),
        "code:dilated": f"```python\n{example}```",
        "modules:mechanisms": modules("attnlab.mechanisms", mechanisms.names()),
        "modules:positions": modules("attnlab.positions", positions.names()),
        "modules:normalisers": modules("attnlab.normalisers", normalisers.names()),
        "modules:tasks": modules("attnlab.tasks", recipes.names()),
    }


def mechanism_table() -> str:
    """Every registered mechanism: declared growth in the length N, options, first sentence."""
    rows = [
        (f"`{name}`", *map(growth, cls.cost), options(cls), summary(cls))
        for name, cls in ((name, mechanisms.get(name)) for name in mechanisms.names())
    ]
    return table(("`attention=`", "time", "memory", "state", "options", ""), rows)


def position_table() -> str:
    """Every registered position module."""
    rows = [
        (f"`{name}`", options(cls), summary(cls))
        for name, cls in ((name, positions.get(name)) for name in positions.names())
    ]
    return table(("`position=`", "options", ""), rows)


def normaliser_table() -> str:
    """Every registered normaliser."""
    rows = [
        (f"`{name}`", options(cls), summary(cls))
        for name, cls in ((name, normalisers.get(name)) for name in normalisers.names())
    ]
    return table(("`normaliser=`", "options", ""), rows)


def config_table(folder: str) -> str:
    """Every config file of a folder and the first line of its docstring."""
    rows = []
    for path in sorted((ROOT / folder).glob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        rows.append((f"`{folder}/{path.name}`", about.partition("\n")[0]))
    return table(("`--config=`", ""), rows)


def corpus_table(field: str, sources: Mapping[str, Source]) -> str:
    """Every source of a field that has a name."""
    rows = [(f"`{name}`", source.description, source.licence) for name, source in sources.items()]
    return table((f"`{field}`", "what", "licence"), rows)


def task_table() -> str:
    """Every task: what its file says first, and its options."""
    rows = []
    for name in recipes.names():
        cls = recipes.get(name)
        about = inspect.getdoc(inspect.getmodule(cls)) or ""
        rows.append((f"`{name}`", options(cls), about.partition("\n")[0]))
    return table(("`task=`", "options", ""), rows)


def result_table(results: dict) -> str:
    """The recorded runs, whose format is in ``experiments/README.md``."""
    rows = [
        (
            f"`{run['command']}`",
            f"{run['test_bits_per_byte']:.3f}",
            ", ".join(f"{n} {b['after_train']:.3f}" for n, b in run["baselines"].items()),
            f"{run['seconds'] / 60:.1f} min",
            f"{run['hardware']}, jax {run['versions']['jax']}",
        )
        for run in results.values()
        if run is not None
    ]
    head = ("command", "test bits per byte", "compressors, after the training text", "time", "on")
    return table(head, rows) if rows else "No run is recorded yet."


def replications(folder: Path) -> list[dict]:
    """Every claim of a paper that an experiment of a folder tests, with its ``experiment`` and the
    measured numbers put into ``ours``; the format is in ``experiments/README.md``. Raises
    `ValueError` for an unknown verdict and for a number that the verdict was not given for."""
    found = []
    for file in sorted(folder.glob("*/expected.json")):
        expected = json.loads(file.read_text(encoding="utf-8"))
        claims = expected.get("replications") if isinstance(expected, dict) else None
        if not claims:
            continue
        results = json.loads(file.with_name("results.json").read_text(encoding="utf-8"))
        for claim in claims:
            if claim["verdict"] not in VERDICTS:
                raise ValueError(f"{file}: no verdict {claim['verdict']!r}; use one of {VERDICTS}")
            values = [value_at(results, path) for path in claim["values"]]
            for value, (low, high) in zip(values, claim["bands"], strict=True):
                if not low <= value <= high:
                    raise ValueError(f"{file}: {claim['claim']}: {value} not in {low}..{high}")
            run = value_at(results, claim.get("run", []))
            measured = {name: run[name] for name in ("command", "hardware")}
            ours = claim["ours"].format(*values).replace("%", " %")
            found.append(claim | measured | {"ours": ours, "experiment": file.parent.name})
    return found


def value_at(results: dict, path: Sequence) -> Any:
    """What stands at a path of keys; in a list, a key is the fields of one of its rows."""
    for key in path:
        if isinstance(key, dict):
            results = next(row for row in results if key.items() <= row.items())
        else:
            results = results[key]
    return results


def replication_table(claims: Sequence[Mapping]) -> str:
    """A row for every claim: whose, where it was tested, and what came out."""
    rows = []
    for claim in claims:
        rows.append((claim["paper"], claim["claim"], f"`{claim['experiment']}`", claim["verdict"]))
    return table(("paper", "claim", "experiment", "verdict"), rows)


def replication_sections(claims: Sequence[Mapping]) -> str:
    """A section for every paper, and in it for every claim the figures of the paper and ours."""
    papers: dict[tuple[str, str], list[Mapping]] = {}
    for claim in claims:
        papers.setdefault((claim["paper"], claim["arxiv"]), []).append(claim)
    lines = []
    for (paper, number), own in papers.items():
        lines += [f"## {paper}", "", f"[arXiv {number}](https://arxiv.org/abs/{number})", ""]
        for claim in own:
            rows = (
                ("published", f"{claim['published']} ({claim['source']})"),
                ("ours", claim["ours"]),
                ("command", f"`{claim['command']}`"),
                ("on", claim["hardware"]),
                ("verdict", f"**{claim['verdict']}**: {claim['why']}"),
            )
            lines += [table(("claim", claim["claim"]), rows), ""]
    return "\n".join(lines).rstrip()


def modules(package: str, names: Sequence[str]) -> str:
    """Directives that show every module of a package on the documentation site."""
    lines = [f".. automodule:: {package}.{name}" for name in names]
    return "\n".join(["```{eval-rst}", *lines, "```"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def growth(exponent: float) -> str:
    return GROWTH.get(exponent, f"N^{exponent:g}")


def options(cls: type) -> str:
    """The fields of a dataclass with their defaults, as they are typed after its section."""
    fields = combination.options(cls)
    return ", ".join(f"`{field.name}={text_of(field.default)}`" for field in fields) or "none"


def summary(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")
