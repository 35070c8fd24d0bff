"""Memory of one of eight devices that share a sequence, and what it computes: results.json.

python experiments/sequence_parallel/measure.py

Each subject runs twice, on one CPU device and on eight virtual ones, in a process of its own that
computes outputs and gradients of the same inputs. Some ten minutes on two CPU cores.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from attnlab.core import Dims, Keys, Queries, Rule, mechanisms, normalisers
from attnlab.progress import peak_memory
from attnlab.sharding import make_mesh

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
DEVICES = 8
SEED = 0
WIDTH = 32  # of the input that gates read
LEARNED = ("q", "k", "v", "x")  # arrays that gradients are taken of


class Subject(NamedTuple):
    """A mechanism with its defaults, the form that splits it, and the sizes it runs at: heads,
    entries of a key, and lengths. One that does not run is only compiled."""

    form: str
    mechanism: str
    heads: int
    dim: int
    lengths: tuple[int, ...]
    normaliser: str = "softmax"
    runs: bool = True


LONG = 65536
SUBJECTS = {
    "softmax": Subject("ring", "softmax", 1, 32, (8192, 16384, 32768, LONG)),
    "softmax_plus_one": Subject("ulysses", "softmax", 8, 16, (16384, LONG), "softmax_plus_one"),
    "window": Subject("neighbours", "window", 4, 64, (LONG,)),
    "linear": Subject("passing", "linear", 4, 64, (LONG,)),
    "gated_delta": Subject("passing", "gated_delta", 4, 64, (LONG,)),
    "gated_slots": Subject("passing", "gated_slots", 4, 64, (LONG,)),
    "lsh": Subject("none: gathered", "lsh", 4, 64, (LONG,), runs=False),
}


def draw(subject: Subject, length: int) -> tuple[Any, dict[str, np.ndarray]]:
    """Parameters, and arrays [1 N ...]: queries, keys, values, what gates read, the cotangent of
    the outputs, and positions. One document fills the row."""
    draws = np.random.default_rng(SEED)
    heads, dim = subject.heads, subject.dim
    dims = Dims(WIDTH, heads, heads, dim, dim)
    params = mechanisms.get(subject.mechanism)().init(jax.random.key(SEED), dims)
    sizes = {name: (heads, dim) for name in ("q", "k", "v", "cotangent")} | {"x": (WIDTH,)}
    arrays = {name: draws.standard_normal((1, length, *size)) for name, size in sizes.items()}
    found = {name: z.astype(np.float32) for name, z in arrays.items()}
    return params, found | {"pos": np.arange(length, dtype=np.int32)[None]}


def programs(subject: Subject, place: Any, whole: Any) -> dict[str, Any]:
    """Outputs, and the gradients of their product with the cotangent, to be called with parameters
    and arrays. ``place`` is where arrays lie, ``whole`` where parameters do."""
    mechanism = mechanisms.get(subject.mechanism)()
    rule = Rule(normaliser=normalisers.get(subject.normaliser)())

    def forward(params: Any, arrays: Mapping[str, Any]) -> Any:
        pos, key = arrays["pos"], jax.random.key(SEED)
        seg = jnp.zeros_like(pos)
        queries = Queries(arrays["q"], pos, seg)
        keys = Keys(arrays["k"], arrays["v"], pos, seg)
        return mechanism(params, queries, keys, rule, x=arrays["x"], key=key).out

    def loss(learned: tuple[Any, Any], rest: Mapping[str, Any]) -> Any:
        params, arrays = learned
        return jnp.sum(forward(params, {**arrays, **rest}) * rest["cotangent"])

    def gradient(params: Any, arrays: Mapping[str, Any]) -> Any:
        learned = {name: arrays[name] for name in LEARNED}
        rest = {name: z for name, z in arrays.items() if name not in LEARNED}
        return jax.grad(loss)((params, learned), rest)

    return {
        "forward": jax.jit(forward, out_shardings=place),
        "gradient": jax.jit(gradient, out_shardings=(whole, place)),
    }


def run(name: str, length: int, devices: int, file: Path) -> dict[str, Any]:
    """What the process of one measurement does: compiles both programs, then calls both, and leaves
    what they computed in ``file``."""
    subject, begun = SUBJECTS[name], peak_memory()
    mesh = make_mesh(f"seq:{devices}")
    place: Any = SingleDeviceSharding(jax.devices()[0])
    whole: Any = place
    if devices > 1:
        place, whole = NamedSharding(mesh, P(None, "seq")), NamedSharding(mesh, P())
    found: dict[str, Any] = {"subject": name, "length": length, "devices": devices}
    with jax.set_mesh(mesh):
        params, arrays = draw(subject, length)
        params, arrays = jax.device_put(params, whole), jax.device_put(arrays, place)
        computed = {}
        for what, program in programs(subject, place, whole).items():
            compiled = program.lower(params, arrays).compile()
            sizes = compiled.memory_analysis()
            found[what] = {
                "arguments": sizes.argument_size_in_bytes,
                "outputs": sizes.output_size_in_bytes,
                "temporary": sizes.temp_size_in_bytes,
            }
            if not subject.runs:
                continue
            clock = time.process_time()
            computed[what] = jax.block_until_ready(compiled(params, arrays))
            found[what] |= {
                "cpu_seconds": round(time.process_time() - clock, 2),
                "peak_rss": peak_memory(),
            }
        found["empty_rss"] = begun
    leaves = jax.tree_util.tree_leaves_with_path(computed)
    numbers = {jax.tree_util.keystr(path): np.asarray(z) for path, z in leaves if z.size}
    np.savez(file, **{key: z for key, z in numbers.items() if z.dtype == np.float32})
    return found


def measure(name: str, length: int, folder: Path) -> list[dict[str, Any]]:
    """Both rows of a subject at a length, the second with the errors of its arrays."""
    rows: list[dict[str, Any]] = []
    files = []
    for devices in (1, DEVICES):
        files.append(folder / f"{devices}.npz")
        command = [sys.executable, __file__, "--of", name, str(length), str(devices), files[-1]]
        chosen = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        found = subprocess.run(command, env=os.environ | chosen, stdout=subprocess.PIPE, check=True)
        rows.append(json.loads(found.stdout))
    if not SUBJECTS[name].runs:
        return rows
    with np.load(files[0]) as wanted, np.load(files[1]) as got:
        assert wanted.files == got.files
        rows[-1]["errors"] = {key: error(got[key], wanted[key]) for key in wanted.files}
    return rows


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, over the largest entry if there is one that is not 0."""
    return float(f"{np.max(np.abs(got - wanted)) / (np.max(np.abs(wanted)) or 1):.2g}")


def on_a_device(row: Mapping[str, Any], what: str) -> int:
    """Bytes that a program keeps on one device: arguments, outputs, and all between."""
    return sum(row[what][part] for part in ("arguments", "outputs", "temporary"))


def outside(rows: list[dict[str, Any]], bands: Mapping[str, Any]) -> list[str]:
    """What is not as expected: shares of memory off their bands, and errors above their limit."""
    said = []
    for name in bands["share"]:
        lengths = [row["length"] for row in rows if row["subject"] == name]
        last = [row for row in rows if row["subject"] == name and row["length"] == max(lengths)]
        one, many = sorted(last, key=lambda row: row["devices"])
        for what, (low, high) in bands["share"][name].items():
            share = on_a_device(many, what) / on_a_device(one, what)
            if not low <= share <= high:
                said.append(f"{name}, {what}: a device has {share:.3f} of one, not {low}..{high}")
    for row in rows:
        for key, value in row.get("errors", {}).items():
            limit = bands["error"].get(row["subject"], bands["error"]["*"])
            if not value <= limit:
                said.append(f"{row['subject']}, {row['length']}: {key} off by {value}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--of", nargs=4, help="what a process measures; not to be typed")
    parser.add_argument("subjects", nargs="*", help="which to measure anew; all")
    options = parser.parse_args()
    if options.of:
        name, length, devices, file = options.of
        print(json.dumps(run(name, int(length), int(devices), Path(file))))
        return
    asked = options.subjects or list(SUBJECTS)
    old = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if options.subjects else []
    rows = [row for row in old if row["subject"] not in asked]
    about = {
        "command": "python experiments/sequence_parallel/measure.py",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": {name: subject._asdict() for name, subject in SUBJECTS.items()},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in asked:
            for length in SUBJECTS[name].lengths:
                rows += measure(name, length, Path(folder))
                show(*rows[-2:])
            text = json.dumps(about | {"rows": rows}, indent=1)
            RESULTS.write_text(text + "\n", encoding="utf-8")
    print("\n".join(outside(rows, json.loads(EXPECTED.read_text()))) or "as expected")


def show(one: Mapping[str, Any], many: Mapping[str, Any]) -> None:
    """Prints what was found of a subject at a length."""
    print(one["subject"], one["length"], many.get("errors", ""), flush=True)
    for what in ("forward", "gradient"):
        for row in (one, many):
            rss = row[what].get("peak_rss", 0) / 2**20
            size = on_a_device(row, what) / 2**20
            spent = row[what].get("cpu_seconds")
            print(f"  {what}, {row['devices']}: {size:.1f} MiB a device, {rss:.0f} RSS, {spent} s")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
