"""Kills a run with SIGKILL at random moments, again and again, lets it end, and compares what it
learnt with a run that nobody disturbed: to the bit.

    python tests/drills/kills.py --layout=1x4 --kills=25 --seed=1
    python tests/drills/kills.py --layout=2x2 --kills=25 --seed=1

LAYOUT is processes x devices of each. Of two processes one is killed, drawn at random; the other
must end by itself. Every start must go on from the newest checkpoint that was whole. What was run
is recorded in tests/drills/README.md.
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
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import home, saved_state, tiny  # noqa: E402

from attnlab.manifest import NAME as MANIFEST  # noqa: E402
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


def steps_in(workdir: Path) -> tuple[list[int], list[str]]:
    """The steps on disk that have their manifest, and the folders that have none: saves under way,
    or what is left of one."""
    folders = [path for path in workdir.glob("checkpoints/*") if path.is_dir()]
    whole = [path for path in folders if path.name.isdecimal() and (path / MANIFEST).exists()]
    return sorted(int(path.name) for path in whole), sorted(
        path.name for path in folders if path not in whole
    )


def last_step(metrics: Path) -> int:
    """The newest that was measured, or 0."""
    return max([0, *(int(n) for n in re.findall(rb'"step": (\d+)', metrics.read_bytes()))])


class Seen(NamedTuple):
    """Of one kill: at which kind of moment it was aimed, the exit code, the steps on disk before
    the start, the one that the run went on from (None: it did not come so far), the steps and the
    unfinished folders on disk after it, and what the run said last."""

    aim: str
    code: int
    before: list[int]
    resumed: int | None
    whole: list[int]
    unfinished: list[str]
    said: str

    def lost(self) -> bool:
        """Whether the run went on from less than what was on disk, or spoilt it."""
        newest = max([0, *self.before])
        return self.resumed not in (None, newest) or max([0, *self.whole]) < newest

    def cut(self) -> bool:
        """Whether a save was cut short. What a run finds it deletes before it goes on, so that only
        one that did not come so far leaves what was there."""
        return bool(self.unfinished) and self.aim != "early"

    def __str__(self) -> str:
        found = f"exit {self.code}, on disk {self.whole}"
        found += f" and unfinished {', '.join(self.unfinished)}" * bool(self.unfinished)
        resumed = "" if self.resumed is None else f"from step {self.resumed}, "
        return f"{self.aim}: {resumed}{found}" + f"; said: {self.said}" * bool(self.said)


def kill_once(layout: str, config: Path, workdir: Path, draw: random.Random) -> Seen:
    """Starts the run, kills one of its processes, waits until all are gone; what was seen.

    One in ten dies before its first step, while it prepares, restores or compiles; four in ten
    while a checkpoint is being written; the others at any moment after some steps.
    """
    log, metrics = workdir.with_suffix(".log"), workdir / "metrics.jsonl"
    changed = metrics.stat().st_mtime_ns if metrics.exists() else 0
    before, _ = steps_in(workdir)
    goal = max([0, *before]) + draw.randrange(1, 11)
    aim = draw.choices(["early", "saving", "step"], [1, 4, 5])[0]
    late = draw.uniform(0, {"early": 6, "saving": 0.05, "step": 0.1}[aim])
    child = start(layout, config, workdir, "--heartbeat-timeout=20")
    while child.poll() is None:
        begun = re.search(r"processes of \d+ devices: ([\d ]+)", log.read_text())
        moved = metrics.exists() and metrics.stat().st_mtime_ns != changed
        ready = aim == "early" or (moved and last_step(metrics) >= goal)
        if begun and ready and (aim != "saving" or steps_in(workdir)[1]):
            time.sleep(late)
            victim = draw.choice(begun[1].split())
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(victim), signal.SIGKILL)
            break
        time.sleep(0.01 if ready else 0.1)
    code = child.wait(timeout=900)
    text = log.read_text()
    ours = [line for line in text.splitlines() if "last good checkpoint" in line]
    resumed = re.search(r"resuming at step (\d+)", text)
    from_step = int(resumed[1]) if resumed else None
    return Seen(aim, code, before, from_step, *steps_in(workdir), ours[-1] if ours else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", default="1x4")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=1e9, help="after which it stops killing")
    options = parser.parse_args()
    sizes = ["train.eval_every=0", "sample.tokens=2", f"train.steps={options.steps}"]
    config = tiny("mesh=fsdp:-1", "model.width=64", *sizes)
    place = Path(tempfile.mkdtemp(dir=home()))
    file, killed, straight = place / "config.json", place / "killed", place / "straight"
    file.write_text(json.dumps(config.to_dict()))
    draw, seen = random.Random(options.seed), []
    began = time.monotonic()
    while len(seen) < options.kills and time.monotonic() < began + 60 * options.minutes:
        each = kill_once(options.layout, file, killed, draw)
        if each.code == 0:
            break  # it has come to its end
        seen.append(each)
        print(f"kill {len(seen)}: {each}", flush=True)
    for workdir in (killed, straight):
        if code := start(options.layout, file, workdir).wait(timeout=1800):
            sys.exit(f"exit {code}\n{workdir.with_suffix('.log').read_text()}")
    states = [saved_state(workdir, config) for workdir in (killed, straight)]
    rows = [read_metrics(workdir / "metrics.jsonl") for workdir in (killed, straight)]
    losses = [[(r["step"], r["train/loss"]) for r in some if "train/loss" in r] for some in rows]
    same = states[0] == states[1] and losses[0] == losses[1]
    lost = sum(each.lost() for each in seen)
    print(
        f"{options.layout}, {len(seen)} kills, seed {options.seed}, "
        f"{sum(each.cut() for each in seen)} of them inside a save: "
        f"{lost} times something was lost; {len(states[0])} leaves and "
        f"{len(losses[0])} losses {'are the same to the bit' if same else 'DIFFER'}; "
        f"{time.monotonic() - began:.0f} s"
    )
    sys.exit(not same or lost > 0)


if __name__ == "__main__":
    main()
