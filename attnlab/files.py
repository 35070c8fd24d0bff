"""Files that are either wholly there or not there at all.

Every small file a run writes (config, lock, manifest, finished marker) goes through here: the bytes
land under a temporary name in the same directory, reach the disk, and then take the final name.
"""

import contextlib
import csv
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` in one step when the block ends without an
    error; a crash at any moment leaves the old file or the new.

    Raises OSError when the directory is missing, read-only or full; the old file is then intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def replace_file(path: str | os.PathLike, content: bytes) -> None:
    """Puts `content` at `path` as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON in one step; TypeError when JSON cannot hold it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    replace_file(path, (text + "\n").encode())


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with the same keys as CSV, in one step; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file; OSError when unreadable, ValueError when it is not JSON."""
    return json.loads(Path(path).read_bytes())


def sync_directory(path: str | os.PathLike) -> None:
    """Makes renames inside `path` survive a power cut, where the file system can promise that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted paths: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat
