"""A script for a SLURM job array, one task a run. Nothing is submitted from here."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from attnlab import children
from attnlab.errors import UserError
from attnlab.files import replace_file

SCRIPT = "sweep.sbatch"
MARK = "# ---- what stands below is written anew by attnlab sweep --slurm ----"
HEAD = """\
#!/bin/bash
# What your cluster asks for; all above the line of dashes may be edited and is kept.
#SBATCH --job-name={name}
#SBATCH --output={folder}/%x-%A_%a.txt
#SBATCH --time=04:00:00
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
##SBATCH --gres=gpu:1
# The run saves its state and stops; submitted again, it goes on.
#SBATCH --signal=B:TERM@120

"""
BODY = """\
set -eu
points=(
{points}
)
cd {cwd}
run=${{points[$SLURM_ARRAY_TASK_ID]}}
exec {program} train --config="$run/{config}" --workdir="$run"
"""


def write_script(folder: Path, runs: Sequence[Path]) -> Path:
    """Writes the script that trains ``runs``, whose configs stand in them, below the head that it
    has, if the user has edited it. Raises `UserError` where the line that ends the head is gone."""
    script = folder / SCRIPT
    head = HEAD.format(name=_word(folder.name), folder=_word(str(folder)))
    if script.exists():
        head, mark, _ = script.read_text(encoding="utf-8").partition(MARK)
        if not mark:
            raise UserError(f"{script} has lost the line {MARK!r}; put it back or delete the file")
    body = BODY.format(
        points="\n".join(f"  {shlex.quote(str(run))}" for run in runs),
        cwd=shlex.quote(str(Path.cwd())),
        program=shlex.join(children.PROGRAM),
        config=children.CONFIG,
    )
    replace_file(script, f"{head}{MARK}\n{body}".encode())
    return script


def array_of(numbers: Sequence[int]) -> str:
    """Ascending numbers as SLURM takes them: ``0-3,7``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] + 1 == number:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)


def _word(text: str) -> str:
    """Text in a directive, which knows no line ends; quoted where it holds blanks."""
    return shlex.quote("".join(text.split("\n")))
