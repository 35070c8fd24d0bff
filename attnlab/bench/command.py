"""``attnlab bench``: what mechanisms cost by length, and beside the packages of others."""

import json
import logging
import os
import platform
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from attnlab.bench.parent import Stopped, Worker, ratio, timing
from attnlab.bench.peers import installed, known
from attnlab.bench.worker import choose_processors
from attnlab.config import base, put, section, to_json
from attnlab.core import positions as registry
from attnlab.entries import make_configs, parse_entries
from attnlab.errors import AttnlabError, DataError, UserError
from attnlab.limits import validate
from attnlab.provenance import describe_processor, find_commit, find_versions

log = logging.getLogger(__name__)

MODES = ("fwd", "fwdbwd", "decode", "train")
EMPTY = 64  # tokens at which a process shows what it needs anyway
LONGEST = 2**31 - 1  # tokens whose positions are int32


class Stop(BaseException):
    """Asked to stop by the signal that it holds; no mere error, which would cost one point."""


class Point(NamedTuple):
    """What is measured at once: an entry at one length."""

    label: str
    position: str
    length: int
    config: ConfigDict


def default_config() -> ConfigDict:
    """One sequence, four heads of 64: the sizes of a measurement without ``--config``."""
    config = base("softmax", "none")
    put(config, "task.batch", 1)
    return config


def bench(
    attention: str,
    lengths: str = "1024,2048,4096",
    positions: str = "",
    mode: str = "fwdbwd",
    peers: bool = False,
    threads: int = 0,
    repeats: int = 7,
    out: str = "runs/bench",
    config: ConfigDict | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    command: Sequence[str] = ("attnlab", "bench"),
) -> int:
    """Measures every entry at every length, prints a table, and adds what it measured to
    ``out``/bench.jsonl, from which bench.md and bench.png are written.

    Returns 0, or the exit code of the first point that could not be measured. SIGINT and SIGTERM
    end the measuring processes and keep the points that were finished: 130 or 143. The same command
    again measures all anew and adds to the file. Raises `UserError` for what cannot be asked,
    `DataError` where nothing can be written.
    """
    from attnlab.bench.tables import write

    if mode not in MODES:
        raise UserError(f"--mode={mode}: one of {', '.join(MODES)}")
    if repeats < 1 or threads < 0:
        raise UserError(f"--repeats={repeats} --threads={threads}: at least 1 and 0")
    choose_processors(threads)
    sizes = parse_lengths(lengths)
    if peers and mode == "decode":
        raise UserError("--peers are measured with --mode=fwd, fwdbwd or train, not decode")
    configs, _ = make_configs(config or default_config(), parse_entries(attention), overrides)
    points = [
        Point(label, each.position.name, length, each)
        for label, given in configs.items()
        for each in in_positions(given, positions)
        for length in sizes
    ]
    for point in points:
        validate(point.config)
    if peers:
        check_peers([point.config.attention.name for point in points], mode)
    folder, rows, code = Path(out), [], 0
    common = {"mode": mode, "threads": threads, "command": list(command), **machine()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "bench.jsonl", "a", encoding="utf-8") as file:
            try:
                with stoppable():
                    for row in measure(points, mode, threads, repeats, peers):
                        rows.append({**row, **common, "time": time.time()})
                        file.write(json.dumps(rows[-1]) + "\n")
                        file.flush()
                        code = code or row.get("code", 0)
            except Stop as stop:
                code = 128 + stop.args[0]
                log.warning("stopped; what was finished is in %s", folder / "bench.jsonl")
        if not rows:
            return code
        print(write(rows, folder))
    except OSError as error:
        raise DataError(f"cannot write in {folder}: {error.strerror}") from None
    print(f"written: {folder / 'bench.jsonl'}, bench.md and bench.png")
    return code


def parse_lengths(text: str) -> list[int]:
    """``1024,4k,64k`` in ascending order. Raises `UserError`."""
    found = []
    for word in text.split(","):
        number, thousand = word.strip().lower().removesuffix("k"), "k" in word.lower()
        if not number.isdecimal() or not int(number):
            raise UserError(f"--lengths={text}: {word!r} is no length; for example 1024,4k,16k")
        found.append(int(number) * (1024 if thousand else 1))
        if found[-1] > LONGEST:
            raise UserError(f"--lengths={text}: {word} is more than {LONGEST:,} tokens")
    return sorted(set(found))


def check_peers(names: Sequence[str], mode: str) -> None:
    """Raises `UserError` if nothing is installed to measure beside any of the mechanisms."""
    if any(installed(name, mode) for name in names):
        return
    wanted = sorted({each for name in names for each in known(name, mode)})
    mend = f"none of {'; '.join(wanted)} is installed" if wanted else "no package is known"
    raise UserError(f"--peers with --mode={mode} of {', '.join(dict.fromkeys(names))}: {mend}")


@contextmanager
def stoppable() -> Iterator[None]:
    """Raises `Stop` at the first SIGINT or SIGTERM; a second one ends the process at once."""

    def stop(number: int, _: object) -> None:
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        raise Stop(number)

    previous = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        for each in previous:
            signal.signal(each, stop)
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def in_positions(config: ConfigDict, names: str) -> list[ConfigDict]:
    """The config with each of the position modules; as it is without any."""
    found = []
    for name in names.split(",") if names else ():
        other = config.copy_and_resolve_references()
        with other.unlocked():
            other.position = section(registry, name.strip())
        found.append(other)
    return found or [config]


def machine() -> dict[str, Any]:
    """Where it was measured."""
    return {
        "machine": f"{os.cpu_count()} cores, {describe_processor()}",
        "versions": {"python": platform.python_version(), **find_versions()},
        "git": find_commit(),
    }


def measure(
    points: Sequence[Point], mode: str, threads: int, repeats: int, peers: bool
) -> Iterator[dict[str, Any]]:
    """A row for each point as it is measured, each followed by those of its peers; first the rate
    of matrix products, which is what a device can do at best."""
    ceilings: dict[str, float] = {}
    empty: dict[tuple[str, str], float] = {}
    for point in points:
        dtype = point.config.model.dtype
        try:
            if dtype not in ceilings:
                ceilings[dtype] = product_rate(point.config, threads)
                yield {"label": "matrix product", "dtype": dtype, "rate": ceilings[dtype]}
            at = point.label, point.position
            if at not in empty:
                empty[at] = _peak(point._replace(length=EMPTY), mode, threads)
            rows = _beside(point, mode, threads, repeats, peers, empty[at])
        except (UserError, DataError, Stopped) as error:
            rows = [{**_name(point), "error": str(error), "code": error.code}]
        for row in rows:
            if "error" in row:
                log.warning("%s, %d tokens: %s", row["label"], row["length"], row["error"])
            for said in row.get("engines", ()):
                log.info("%s, %d tokens: %s", row["label"], row["length"], said)
            yield {**row, "dtype": dtype, "ceiling": ceilings.get(dtype, 0.0)}


def product_rate(config: ConfigDict, threads: int) -> float:
    """FLOP/s of matrix products, the best of a few calls."""
    asked = {"config": json.loads(to_json(config)), "mode": "product", "length": 2048}
    with Worker({**asked, "threads": threads}) as worker:
        while not worker.enough(10):
            worker.call()
        return worker.about["flops"] / min(call["wall"] for call in worker.calls)


def _asked(point: Point, mode: str, threads: int) -> dict[str, Any]:
    config = json.loads(to_json(point.config))
    return {"config": config, "mode": mode, "length": point.length, "threads": threads}


def _peak(point: Point, mode: str, threads: int) -> float:
    with Worker(_asked(point, mode, threads)) as worker:
        worker.call()
        return worker.calls[-1]["peak"]


def _name(point: Point) -> dict[str, Any]:
    return {"label": point.label, "position": point.position, "length": point.length}


def _beside(
    point: Point, mode: str, threads: int, repeats: int, peers: bool, empty: float
) -> list[dict[str, Any]]:
    """The row of a point, and of each peer, which is called in turn with it, A B B A, every
    time once more than is counted."""
    asked, rows = _asked(point, mode, threads), []
    with Worker(asked) as ours:
        if not peers:
            while not ours.enough(repeats):
                ours.call()
        for name in installed(point.config.attention.name, mode) if peers else ():
            first = len(ours.calls)
            try:
                with Worker({**asked, "peer": name}) as theirs:
                    while not theirs.enough(repeats):
                        pair = (ours, theirs) if len(theirs.calls) % 2 else (theirs, ours)
                        for worker in pair:
                            worker.wake()
                            worker.call()
                    row = _row(theirs, {**_name(point), "label": name}, 0.0)
                    for kind in ("wall", "cpu"):
                        calls = [call[kind] for call in ours.calls[first:]]
                        found = ratio(calls, [call[kind] for call in theirs.calls])
                        row[f"ours_by_theirs_{kind}"] = found._asdict()
                    rows.append({**row, "peer_of": point.label})
            except AttnlabError as error:
                rows.append({**_name(point), "label": name, "error": str(error), "code": 0})
        while not ours.enough(repeats):
            ours.call()
        return [_row(ours, _name(point), empty), *rows]


def _row(worker: Worker, name: dict[str, Any], empty: float) -> dict[str, Any]:
    about, calls = worker.about, worker.calls
    wall, cpu = (timing([call[kind] for call in calls]) for kind in ("wall", "cpu"))
    peak = max(call["peak"] for call in calls)
    return {
        **name,
        "wall": wall._asdict(),
        "cpu": cpu._asdict(),
        "calls": len(calls),
        "compiling": about["compiling"],
        "tokens_per_second": about["tokens"] / wall.median,
        "flops": about["flops"],
        "rate": about["flops"] / wall.median,
        "state": about["state"],
        "peak": peak,
        "above_empty": peak - empty if empty else None,
        "device": about["device"],
        "platform": about["platform"],
        "engines": about["engines"],
    }
