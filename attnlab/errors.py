"""What can go wrong that is not our bug, and the exit code each kind ends with.

A message is one line: what is wrong, where, and the fix. `main` prints it without a traceback
(unless ``--debug``) and exits with `code`.
"""

import difflib
from collections.abc import Iterable


class AttnlabError(Exception):
    """Base of every error that a user can mend; anything else is a bug and exits 1."""

    code = 1


class UserError(AttnlabError, ValueError):
    """A wrong name, value, path or combination typed by the user. Exit code 2."""

    code = 2


class DataError(AttnlabError):
    """Data or a checkpoint that is missing, damaged or unreachable. Exit code 3."""

    code = 3


class PeerError(AttnlabError):
    """Another process of the run, or what joins them, is gone or does not answer. Exit code 4."""

    code = 4


class MissingError(DataError):
    """Data that are not on this machine, and how to get them; nothing is damaged."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error line: the nearest known names, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "known: " + (", ".join(known) if known else "none")
