"""Arrays by name in a folder, written asynchronously and in shards: the only file that knows orbax.

Each array is an entry under its dotted path, readable without attnlab by
`orbax.checkpoint.StandardCheckpointer().restore(folder)`. A folder appears under its final name
when every process has written its shards. Nothing here detects damage; see manifest.py.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

TEMPORARY = ".orbax-checkpoint-tmp"  # ends the name of a folder being written


class ArrayStore:
    """One save at a time; the handle to orbax is made by the first one."""

    def __init__(self):
        self._writer: Any = None

    def save(self, folder: Path, arrays: dict[str, Any]) -> None:
        """Copies `arrays` to the host and returns; a thread writes them to `folder`.

        Raises OSError and the like when it cannot even start.
        """
        import orbax.checkpoint as ocp

        if self._writer is None:
            _mute_tracebacks()
            self._writer = ocp.AsyncCheckpointer(
                ocp.PyTreeCheckpointHandler(),
                # Made in the background, a folder that cannot be made is waited for 300 seconds.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            )
        self._writer.save(folder, args=ocp.args.PyTreeSave(arrays))

    def wait(self) -> None:
        """Blocks until `folder` has its final name; raises whatever writing it raised."""
        if self._writer is not None:
            self._writer.wait_until_finished()

    def read(self, folder: Path, placement: dict[str, jax.sharding.Sharding | None]) -> dict:
        """The named arrays of `folder`, as jax.Array with that sharding, or NumPy for None."""
        import orbax.checkpoint as ocp

        if not placement:
            return {}
        arguments = {
            name: ocp.RestoreArgs(restore_type=np.ndarray)
            if sharding is None
            else ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
            for name, sharding in placement.items()
        }
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    item=dict.fromkeys(placement, 0),
                    restore_args=arguments,
                    partial_restore=True,
                ),
            )

    def close(self) -> None:
        """Waits like `wait` and releases the threads."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def explain(error: BaseException) -> str:
    """One line for a failed save; the page that the array library writes holds one errno."""
    text = " ".join(str(error).split()) or type(error).__name__
    number = re.search(r"os_error_code='(\d+)'", text)
    if number:
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text[:200]


def _mute_tracebacks() -> None:
    # Its threads log the same failure five times over; `wait` raises it once.
    logger = logging.getLogger("absl")
    if _is_wanted not in logger.filters:
        logger.addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)
