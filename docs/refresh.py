"""Rewrites what the README repeats: the tables of mechanisms, positions, corpora and results.

python docs/refresh.py

Each stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``; the code of ``docs/examples`` that the
README shows stands there too. A test fails while the README is not what this would write.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from attnlab.core import mechanisms, positions
from attnlab.data.corpora import CORPORA
from attnlab.literals import text_of

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "experiments" / "quickstart" / "results.json"
GROWTH = {0.0: "1", 1.0: "N"}


def refreshed(text: str) -> str:
    """``text`` with every marked part written anew. Raises `ValueError` for a missing marker."""
    for name, part in parts().items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not marked.search(text):
            raise ValueError(f"README.md has no <!-- {name} --> ... <!-- /{name} -->")
        text = marked.sub(lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text)
    return text


def parts() -> dict[str, str]:
    """What stands between the markers, by their name."""
    example = (ROOT / "docs" / "examples" / "strided.py").read_text(encoding="utf-8")
    return {
        "table:mechanisms": mechanism_table(),
        "table:positions": position_table(),
        "table:corpora": corpus_table(),
        "table:results": result_table(json.loads(RESULTS.read_text(encoding="utf-8"))),
        "code:strided": f"```python\n{example}```",
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


def corpus_table() -> str:
    """Every corpus that has a name."""
    rows = [(f"`{name}`", source.description, source.licence) for name, source in CORPORA.items()]
    return table(("`task.corpus`", "what", "licence"), rows)


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


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)


def growth(exponent: float) -> str:
    return GROWTH.get(exponent, f"N^{exponent:g}")


def options(cls: type) -> str:
    """The fields of a dataclass with their defaults, as they are typed after its section."""
    fields = getattr(cls, "__dataclass_fields__", {}).values()
    return ", ".join(f"`{field.name}={text_of(field.default)}`" for field in fields) or "none"


def summary(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    README.write_text(refreshed(README.read_text(encoding="utf-8")), encoding="utf-8")
