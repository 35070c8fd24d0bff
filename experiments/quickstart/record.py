"""Copies the numbers of a finished run into results.json.

python experiments/quickstart/record.py NAME WORKDIR --hardware=TEXT --seconds=S
"""

import argparse
import json
import shlex
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")


def record(workdir: Path, hardware: str, seconds: float) -> dict:
    """The entry of one run. Raises `FileNotFoundError` for a run that is not finished."""

    def read(name: str) -> dict:
        return json.loads((workdir / name).read_text(encoding="utf-8"))

    test, start = read("test.json"), read("run.json")["attempts"][-1]
    return {
        "command": retyped(start["command"], workdir.name),
        "hardware": hardware,
        "versions": start["versions"],
        "commit": (start["git"] or {}).get("commit"),
        "seconds": seconds,
        "test_bits_per_byte": test["bits_per_byte"],
        "test_bits_per_byte_95": test["bits_per_byte_95"],
        "documents": test["documents"],
        "baselines": read("baselines.json"),
    }


def retyped(command: list[str], name: str) -> str:
    """The command as a reader would type it: in a clone, with the run under ``runs``."""
    words = [word for word in command if word != "--debug"]
    moved = (f"--workdir=runs/{name}" if w.startswith("--workdir=") else w for w in words)
    return shlex.join(moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    parser.add_argument("name", choices=list(results))
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    results[given.name] = record(given.workdir, given.hardware, given.seconds)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
