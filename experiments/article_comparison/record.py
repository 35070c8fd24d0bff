"""Copies a comparison into results.json, draws its picture and writes its tables into the README.

python experiments/article_comparison/record.py NAME WORKDIR --hardware=TEXT
python experiments/article_comparison/record.py
"""

import argparse
import json
import re
import shlex
from pathlib import Path

from attnlab.charts import plot_overview
from attnlab.scoreboard import tables, title_of

HERE = Path(__file__).parent
PICTURES = HERE.parents[1] / "docs" / "images"


def read(name: str) -> dict:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def record(workdir: Path, hardware: str) -> dict:
    """A comparison as it goes into results.json. Raises `FileNotFoundError` where there is none."""
    result = json.loads((workdir / "comparison.json").read_text(encoding="utf-8"))
    words = [word for word in result["command"] if word != "--debug"]
    moved = ["--workdir=runs/compared" if w.startswith("--workdir=") else w for w in words]
    environment = {k: result["environment"].get(k) for k in ("devices", "versions", "git")}
    return {**result, "command": moved, "environment": environment, "hardware": hardware}


def outside(result: dict, expected: dict) -> list[str]:
    """What lies outside the bands of expected.json, or did not come to its end."""
    said = []
    for entry in result["entries"]:
        if entry["state"] != "finished":
            said.append(f"{entry['label']}: {entry['state']}: {entry['reason']}")
            continue
        absent = (entry["needle"] or {}).get("absent", {})
        found = {"bits_per_byte": entry["test"]["bits_per_byte"]}
        found |= {f"absent_{name}": value for name, value in absent.items()}
        for name, (low, high) in expected.items():
            if name in found and not low <= found[name] <= high:
                said.append(f"{entry['label']}: {name} {found[name]:.4g} outside {low} to {high}")
    return said


def page(text: str, results: dict) -> str:
    """The README with what stands between its marks written anew."""
    for name, result in results.items():
        shown = "Not recorded yet."
        if result is not None:
            picture = f"![{title_of(result)}](../../docs/images/comparison_{name}.png)"
            jax = result["environment"]["versions"]["jax"]
            shown = (
                f"{title_of(result)}; {result['hardware']}, jax {jax}.\n\n{picture}\n\n"
                f"```sh\n{shlex.join(result['command'])}\n```\n\n{tables(result)}"
            )
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = mark.sub(lambda m, shown=shown: f"{m[1]}{shown.rstrip()}\n{m[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    results = read("results.json")
    parser.add_argument("name", nargs="?", choices=list(results))
    parser.add_argument("workdir", nargs="?", type=Path)
    parser.add_argument("--hardware", default="")
    given = parser.parse_args()
    if given.name:
        if given.workdir is None or not given.hardware:
            parser.error("NAME needs WORKDIR and --hardware")
        results[given.name] = record(given.workdir, given.hardware)
        text = json.dumps(results, indent=1) + "\n"
        (HERE / "results.json").write_text(text, encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for name, result in results.items():
        if result is not None:
            plot_overview(result["entries"], PICTURES / f"comparison_{name}.png", title_of(result))
            print(
                "\n".join(outside(result, read("expected.json")[name]) or [f"{name}: as expected"])
            )
    readme = HERE / "README.md"
    text = page(readme.read_text(encoding="utf-8"), results)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
