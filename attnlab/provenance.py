"""Where a number came from: versions, devices and commit, so that a run can be repeated."""

import importlib.metadata
import os
import platform
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VECTORS = ("avx512f", "avx2", "avx", "sve", "asimd")
"""Of processors, the widest first."""
PACKAGES = ("attnlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def describe_attempt(command: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """One start of a run as a JSON object. Starts the jax backend to name the devices."""
    return {
        "command": list(command),
        "overrides": list(overrides),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **find_versions()},
        "devices": describe_devices(),
        "git": find_commit(),
    }


def find_versions() -> dict[str, str | None]:
    """Package -> installed version, None when absent. Imports none of them."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if versions["attnlab"] is None:
        from attnlab import __version__

        versions["attnlab"] = __version__
    return versions


def describe_devices() -> dict[str, Any]:
    """{"platform", "kind", "count", "processes"} of what jax runs on."""
    import jax

    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
    }


def describe_processor(info: str | os.PathLike = "/proc/cpuinfo") -> str:
    """The architecture, the name and the widest vectors of this machine's processor, as far as it
    tells: "x86_64, AMD EPYC, avx512f". Times of one program differ by factors between them."""
    try:
        text = Path(info).read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    said: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        said.setdefault(key.strip().lower(), value.strip())
    have = (said.get("flags") or said.get("features", "")).split()
    widest = next((flag for flag in VECTORS if flag in have), "")
    found = (platform.machine(), said.get("model name", platform.processor()), widest)
    return ", ".join(dict.fromkeys(each for each in found if each))


def find_commit(file: str | os.PathLike = __file__) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the git tree that tracks `file`; None outside one or without git.

    Untracked files do not make a tree dirty, except below the package, where they can be imported.
    """
    file = Path(file).resolve()
    # An installed copy may lie in a virtual environment inside somebody else's repository.
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(file.parent, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(file.parent, "diff", "--name-only", "HEAD")
    added = _git(file.parent, "ls-files", "--others", "--exclude-standard", ".")
    return {"commit": commit, "dirty": bool(changed or added)}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
