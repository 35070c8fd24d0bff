"""The command line: ``attnlab train --config=configs/lm.py:attention=window --workdir=runs/a``.

Exit codes: 0 done, 1 a bug of ours, 2 something typed wrong or too large for the machine, 3 data or
a checkpoint missing, damaged or impossible to write, 4 another process of the run gone or no step
ended in time, 130 interrupted, 141 nobody reads the output, 143 terminated.
Nothing heavy is imported before the command and its flags are known to be good.
"""

import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from attnlab import __version__, hosts, large_pages
from attnlab.commands import COMMANDS
from attnlab.errors import AttnlabError, UserError, did_you_mean
from attnlab.flags import columns, describe, parse_line

BUG, TYPED, DAMAGED, INTERRUPTED, UNREAD = 1, 2, 3, 130, 141

STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
"""What the machine, not the program, refuses when a file is opened or written."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors become one line on stderr.

    One of several processes that fails does not return, see `hosts.leave`.
    """
    if argv is None:
        large_pages.use()
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = any(word in ("--debug", "--debug=true") for word in argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without ᵀ is no reason to fail
            stream.reconfigure(errors="replace")
    try:
        code = _dispatch(argv) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the flush at exit must not fail again
        return hosts.leave(UNREAD)
    except SystemExit as exit:
        return hosts.leave(exit.code if isinstance(exit.code, int) else BUG if exit.code else 0)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED, debug)
    except AttnlabError as error:
        return _complain(str(error), error.code, debug)
    except Exception as error:
        return _complain(*_explain(error), debug)


SMALLER = (
    "raise --config.optimizer.accumulate, set --config.model.remat=true, lower "
    "--config.task.batch or --config.task.length; `attnlab plan` estimates the need"
)


def _dispatch(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("--help", "-h", "help"):
        if len(argv) > 1 and argv[1] in COMMANDS:
            print(describe(argv[1], COMMANDS[argv[1]]))
            return 0
        commands = columns({name: command.summary for name, command in COMMANDS.items()})
        print(f"usage: attnlab COMMAND [flags]\n\n{commands}\n\nattnlab COMMAND --help says more.")
        return 0 if argv else TYPED
    if argv[0] == "--version":
        print(f"attnlab {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; {did_you_mean(name, COMMANDS)}")
    command = COMMANDS[name]
    if {"--help", "-h"} & set(argv[1:]):
        print(describe(name, command))
        return 0
    line = parse_line(name, command, argv[1:])
    line.flags.pop("debug", None)
    _prepare()
    return command.run(line)


def _prepare() -> None:
    """Log lines to stderr, and compiled programs kept between processes.

    jax reads the variable when it is imported; a directory that cannot be written only costs the
    compilations.
    """
    logging.basicConfig(format="attnlab: %(message)s", level=logging.WARNING)
    logging.getLogger("attnlab").setLevel(logging.INFO)
    from attnlab.data.places import data_dir

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(data_dir() / "compiled"))


def _complain(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"attnlab: {message}", file=sys.stderr)
    return hosts.leave(code)


def _explain(error: Exception) -> tuple[str, int]:
    """The line and the exit code of an error that none of ours announced."""
    reason = _first_line(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return f"out of memory: {reason}; {SMALLER}", TYPED
    if isinstance(error, OSError) and error.errno in STORAGE:
        return f"{reason}; free or choose another place to write", DAMAGED
    what = f"{type(error).__name__}: {reason} ({_place(error)})"
    return f"this is a bug in attnlab: {what}; --debug shows the traceback", BUG


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _place(error: Exception) -> str:
    """The innermost of our own lines that the error passed through."""
    package = Path(__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).is_relative_to(package)]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


if __name__ == "__main__":
    sys.exit(main())
