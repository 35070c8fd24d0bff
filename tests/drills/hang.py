"""Stops one of two processes with SIGSTOP, which no library notices: the other must say so and end.

    python tests/drills/hang.py --seconds=60

What was run is recorded in tests/drills/README.md.
"""

import argparse
import json
import os
import re
import signal
import tempfile
import time
from pathlib import Path

from kills import last_step, start
from tiny import home, tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="--step-timeout; > compiling")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=home()))
    config, workdir = place / "config.json", place / "run"
    sizes = ("train.eval_every=0", "train.steps=100000", "train.save_every=20")
    config.write_text(json.dumps(tiny(*sizes).to_dict()))
    child = start("2x1", config, workdir, f"--step-timeout={options.seconds}")
    metrics, log = workdir / "metrics.jsonl", workdir.with_suffix(".log")
    while child.poll() is None and not (metrics.exists() and last_step(metrics) >= 50):
        time.sleep(0.05)
    begun = re.search(r"processes of \d+ devices: (\d+) (\d+)", log.read_text())
    os.kill(int(begun[2]), signal.SIGSTOP)
    stopped = time.monotonic()
    code = child.wait(timeout=600)
    print(f"exit {code}, {time.monotonic() - stopped:.0f} s after process 1 was stopped")
    print(log.read_text().splitlines()[-1])


if __name__ == "__main__":
    main()
