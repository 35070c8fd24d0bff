"""Kills a run with SIGKILL at random moments, again and again, lets it end, and compares what it
learnt with a run that nobody disturbed: to the bit.

    python tests/drills/kills.py --layout=1x4 --kills=25 --seed=1
    python tests/drills/kills.py --layout=2x2 --kills=25 --seed=1

LAYOUT is processes x devices of each. Of two processes one is killed, drawn at random; the other
must end by itself. What was run is recorded in tests/drills/README.md.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import home, saved_state, tiny  # noqa: E402

from attnlab.metrics import read_metrics  # noqa: E402


def start(layout: str, config: Path, workdir: Path, *flags: str) -> subprocess.Popen:
    """The run, as `attnlab launch` starts it; what it says is beside the workdir, in .log."""
    train = ["train", f"--config={config}", f"--workdir={workdir}", *flags]
    command = [sys.executable, "-m", "attnlab", "launch", "--local", layout, "--", *train]
    log = workdir.with_suffix(".log")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(home() / "compiled")}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    paths = {"PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        return subprocess.Popen(command, env=os.environ | cache | paths, stdout=file, stderr=file)


def saved(workdir: Path) -> list[int]:
    """The steps on disk, whole or not."""
    return sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdecimal())


def last_step(metrics: Path) -> int:
    """The newest that was measured, or 0."""
    return max([0, *(int(n) for n in re.findall(rb'"step": (\d+)', metrics.read_bytes()))])


def kill_once(layout: str, config: Path, workdir: Path, draw: random.Random) -> str:
    """Starts the run, kills one of its processes, waits until all are gone; what was seen."""
    log, metrics = workdir.with_suffix(".log"), workdir / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    # How many steps it gets; one in ten dies before the first, while it prepares or compiles.
    goal = max([0, *saved(workdir)]) + draw.randrange(1, 16)
    early = draw.random() < 0.1
    child = start(layout, config, workdir, "--heartbeat-timeout=20")
    while child.poll() is None:
        begun = re.search(r"processes of \d+ devices: ([\d ]+)", log.read_text())
        moved = metrics.exists() and metrics.stat().st_mtime_ns != before
        if begun and (early or (moved and last_step(metrics) >= goal)):
            time.sleep(draw.uniform(0, 6 if early else 0.1))
            victim = draw.choice(begun[1].split())
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(victim), signal.SIGKILL)
            break
        time.sleep(0.05)
    code = child.wait(timeout=300)
    ours = [line for line in log.read_text().splitlines() if re.match(r"\[\d+\] attnlab:", line)]
    return f"exit {code}, on disk {saved(workdir)}, last said: {ours[-1] if ours else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", default="1x4")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    sizes = ["train.eval_every=0", "sample.tokens=2", f"train.steps={options.steps}"]
    config = tiny("mesh=data:2,fsdp:-1", "model.width=64", *sizes)
    place = Path(tempfile.mkdtemp(dir=home()))
    file, killed, straight = place / "config.json", place / "killed", place / "straight"
    file.write_text(json.dumps(config.to_dict()))
    draw, killings = random.Random(options.seed), 0
    began = time.monotonic()
    for number in range(1, options.kills + 1):
        seen = kill_once(options.layout, file, killed, draw)
        killings += not seen.startswith("exit 0")
        print(f"kill {number}: {seen}", flush=True)
    for workdir in (killed, straight):
        if code := start(options.layout, file, workdir).wait(timeout=600):
            sys.exit(f"exit {code}\n{workdir.with_suffix('.log').read_text()}")
    states = [saved_state(workdir, config) for workdir in (killed, straight)]
    rows = [read_metrics(workdir / "metrics.jsonl") for workdir in (killed, straight)]
    losses = [[(r["step"], r["train/loss"]) for r in some if "train/loss" in r] for some in rows]
    same = states[0] == states[1] and losses[0] == losses[1]
    print(
        f"{options.layout}, {killings} kills, seed {options.seed}: {len(states[0])} leaves and "
        f"{len(losses[0])} losses {'are the same to the bit' if same else 'DIFFER'}; "
        f"{time.monotonic() - began:.0f} s"
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
