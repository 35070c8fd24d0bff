"""The manifest of one checkpoint step: what should be there, byte for byte.

`manifest.json` lists every file of the step with its size and sha256, the shape and dtype of every
leaf, the plain Python numbers of the state, and the caller's `extra`. It is written last, so its
presence says that the step is complete; it is compared on restore, so a flipped bit is an error and
not a wrong model. The manifest guards itself: its first field is the sha256 of the rest.

Cost: one sequential read of the step when written and one when verified.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from attnlab.files import replace_file, sync_directory

NAME = "manifest.json"
FORMAT = 1


class Damage(Exception):
    """A step that cannot be trusted: the message names the file and what is wrong with it."""


def write_manifest(step_directory: Path, body: dict[str, Any]) -> None:
    """Hashes every file below `step_directory`, makes it durable, then writes the manifest.

    `body` is any JSON object; the keys "format" and "files" are added to it.
    """
    files = {}
    for name in _file_names(step_directory):
        with open(step_directory / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
            os.fsync(file.fileno())
    for folder in {(step_directory / name).parent for name in files}:
        sync_directory(folder)
    replace_file(step_directory / NAME, _render(body | {"format": FORMAT, "files": files}))


def read_manifest(step_directory: Path) -> dict[str, Any]:
    """The manifest's body. Raises Damage when it is missing, garbage, altered, or too new."""
    path = step_directory / NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Damage(f"{path} is missing: the save was cut short") from None
    except OSError as error:
        raise Damage(f"{path} cannot be read: {error.strerror}") from None
    try:
        body = json.loads(content)["body"]
        intact = isinstance(body["files"], dict) and _render(body) == content
    except (ValueError, LookupError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise Damage(f"{path} is damaged: its own sha256 does not match")
    if body.get("format") != FORMAT:
        raise Damage(f"{path} has format {body.get('format')}, this version reads {FORMAT}")
    return body


def check_sizes(step_directory: Path, body: dict[str, Any]) -> None:
    """Raises Damage for the first file that is missing or has the wrong size. Reads no data."""
    for name, expected in body["files"].items():
        path = step_directory / name
        try:
            size = path.stat().st_size
        except OSError:
            raise Damage(f"{path} is missing") from None
        if size != expected["bytes"]:
            raise Damage(f"{path} has {size} bytes, expected {expected['bytes']}")


def check_files(step_directory: Path, body: dict[str, Any]) -> None:
    """Raises Damage for the first file whose size or sha256 differs. Reads every byte once."""
    check_sizes(step_directory, body)
    for name, expected in body["files"].items():
        path = step_directory / name
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Damage(f"{path} cannot be read: {error.strerror}") from None
        if digest != expected["sha256"]:
            raise Damage(
                f"{path} is damaged: sha256 {digest[:12]}, expected {expected['sha256'][:12]}"
            )


def _file_names(directory: Path) -> list[str]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if name != NAME)


def _render(body: dict[str, Any]) -> bytes:
    # Byte-exact, so that reading back and rendering again detects any change at all; the first
    # pass turns tuples and integer keys into what JSON will give back.
    body = json.loads(json.dumps(body, allow_nan=False))
    text = json.dumps(body, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256": "{digest}", "body": {text}}}\n'.encode()
