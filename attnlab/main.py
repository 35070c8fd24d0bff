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
from attnlab.errors import AttnlabError, UserError, did_you_mean
from attnlab.flags import Command, Flag, Line, columns, describe, parse_line

BUG, TYPED, DAMAGED, INTERRUPTED, UNREAD = 1, 2, 3, 130, 141

STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
"""What the machine, not the program, refuses when a file is opened or written."""


def train(line: Line) -> int | None:
    workdir = line.need("workdir", "runs/first")
    config = _config(line)
    patience = line.flags.pop("step-timeout", 0)
    if patience < 0:
        raise UserError(f"--step-timeout={patience}: must be at least 0 seconds; 0 = off")
    hosts.start(line.flags)
    from attnlab.train import train

    return train(
        config=config, workdir=workdir, command=["attnlab", *line.typed], patience=patience
    )


def evaluate(line: Line) -> int | None:
    line.need("workdir", "runs/first")
    if "suite" in line.flags:
        if "stride" in line.flags:
            raise UserError("--stride: a suite reads every token once; leave it out")
        if given := hosts.HOSTS.keys() & line.flags:
            raise UserError(f"--{min(given)}: a suite is measured by one process; leave it out")
        from attnlab.suite import run_suite

        return run_suite(**line.flags)
    if "toy" in line.flags:
        raise UserError("--toy belongs to --suite=long_context")
    hosts.start(line.flags)
    from attnlab.evaluate import evaluate

    return evaluate(**line.flags)


def generate(line: Line) -> int | None:
    line.need("workdir", "runs/first")
    from attnlab.decode import generate

    return generate(**line.flags)


def compare(line: Line) -> int | None:
    workdir = line.need("workdir", "runs/compared")
    attention = line.need("attention", "softmax,window")
    line.need("config", "configs/compare.py")
    own = [(path, text) for path, text in line.overrides if _of_attention(path)]
    line.overrides = [pair for pair in line.overrides if pair not in own]
    config = _config(line)
    import jax

    from attnlab.compare import compare

    # The runs have processes of their own, which need the memory of the accelerator to themselves.
    jax.config.update("jax_platforms", "cpu")
    return compare(config, attention, workdir, own, ["attnlab", *line.typed])


def sweep(line: Line) -> int | None:
    if len(line.words) + ("config" in line.flags) > 1:
        raise UserError("sweep takes one file of configs")
    workdir = line.need("workdir", "runs/learning_rate")
    file = line.words[0] if line.words else line.need("config", "configs/sweeps/learning_rate.py")
    from attnlab.overrides import load_sweep, override

    configs = load_sweep(file)
    for config in configs:
        for path, text in line.overrides:
            override(config, path, text)
    options = {k: v for k, v in line.flags.items() if k in ("workers", "slurm")}
    import jax

    from attnlab.sweep import sweep

    jax.config.update("jax_platforms", "cpu")  # as for compare
    return sweep(configs, workdir, command=["attnlab", *line.typed], **options)


def needle(line: Line) -> int | None:
    line.need("workdir", "runs/first")
    from attnlab.needle import needle

    return needle(**line.flags)


def dilution(line: Line) -> int | None:
    from attnlab.analysis.command import dilution

    return dilution(**line.flags)


def bench(line: Line) -> int | None:
    line.need("attention", "softmax,window")
    own = [(path, text) for path, text in line.overrides if _of_attention(path)]
    others = [pair for pair in line.overrides if pair not in own]
    from attnlab.bench.command import bench, default_config
    from attnlab.overrides import load, override

    file = line.flags.pop("config", None)
    config = load(file) if file else default_config()
    for path, text in others:
        override(config, path, text)
    return bench(config=config, overrides=own, command=["attnlab", *line.typed], **line.flags)


def plan(line: Line) -> int | None:
    config = _config(line)
    from attnlab.plan import plan

    return plan(config)


def export(line: Line) -> int | None:
    line.need("workdir", "runs/first")
    line.need("to", "first.safetensors")
    from attnlab.transfer import export_run

    return export_run(**line.flags)


def import_weights(line: Line) -> int | None:
    if len(line.words) != 1:
        raise UserError("import needs one file, for example attnlab import first.safetensors")
    workdir = line.need("workdir", "runs/tuned")
    from attnlab.overrides import load
    from attnlab.tensors import open_tensors
    from attnlab.transfer import config_of, import_file

    source = open_tensors(line.words[0])
    config = load(line.flags["config"]) if "config" in line.flags else config_of(source)
    _change(config, line)
    partial, command = line.flags.get("allow_partial", False), ["attnlab", *line.typed]
    return import_file(source, workdir, config, allow_partial=partial, command=command)


def list_known(line: Line) -> int | None:
    if len(line.words) > 1:
        raise UserError(f"list shows one thing at a time, not {' and '.join(line.words)}")
    from attnlab.listing import show

    return show(*line.words)


def data(line: Line) -> int | None:
    verb, *names = line.words or ["(nothing)"]
    arity = {"list": 0, "get": 1, "info": 1}
    if verb not in arity:
        raise UserError(f"data {verb}: {did_you_mean(verb, arity)}")
    if len(names) != arity[verb]:
        raise UserError(f"usage: attnlab data {verb}{' NAME' * arity[verb]}")
    from attnlab.data import tables

    return getattr(tables, f"run_{verb}")(*names)


def report(line: Line) -> int | None:
    if not line.words:
        raise UserError("report needs the workdirs to compare, for example attnlab report runs/*")
    from attnlab.report import report

    return report(workdirs=line.words, **line.flags)


def launch(line: Line) -> int | None:
    from attnlab.launch import launch

    shape = line.need("local", "2x2")
    name = line.words[0] if line.words else ""
    together = [n for n, command in COMMANDS.items() if hosts.HOSTS.keys() <= command.flags.keys()]
    if name not in together:
        known = " or ".join(together)
        raise UserError(
            f"launch needs -- and then {known}, not {name!r}: launch --local 2x2 -- ..."
        )
    inner = parse_line(name, COMMANDS[name], line.words[1:])
    if given := [flag for flag in hosts.PLACE if flag in inner.flags]:
        raise UserError(f"--{given[0]}: launch says that itself; leave it out")
    return launch(shape, line.words)


CONFIG = {"config": Flag("a Python file with get_config(arg), or a .json", example="FILE[:ARG]")}
WORKDIR = {"workdir": Flag("directory of the run", example="DIR")}
STEP = {"step": Flag("which checkpoint; default the newest", int, "K")}

COMMANDS = {
    "train": Command(
        train,
        "Train, or go on training: the same command resumes. Without --config the config is that "
        "of the workdir.",
        {
            **CONFIG,
            **WORKDIR,
            "step-timeout": Flag(
                "exit 4 if no step ends for so long, compiling included (default off)", float, "S"
            ),
            **hosts.HOSTS,
        },
        configured=True,
    ),
    "evaluate": Command(
        evaluate,
        "Score whole held-out documents with the checkpoint of a run.",
        {
            **WORKDIR,
            "split": Flag("train, validation or test (default test)", example="NAME"),
            "length": Flag("tokens of a window; default that of training", int, "N"),
            "stride": Flag("tokens scored per window; default all", int, "S"),
            "suite": Flag("long_context: at many lengths, up to --length", example="NAME"),
            "toy": Flag("a suite in a minute, of few tokens", bool),
            **STEP,
            **hosts.HOSTS,
        },
    ),
    "generate": Command(
        generate,
        "Continue a prompt with the checkpoint of a run.",
        {
            **WORKDIR,
            "prompt": Flag("text to continue", example="TEXT"),
            "tokens": Flag("how many to draw", int, "N"),
            "temperature": Flag("0 takes the likeliest token", float, "T"),
            "top_k": Flag("draw from the K likeliest; 0 = off", int, "K"),
            "top_p": Flag("draw from the likeliest that sum to P; 1 = off", float, "P"),
            "seed": Flag("of the draws", int, "N"),
            **STEP,
        },
    ),
    "compare": Command(
        compare,
        "Train several mechanisms under the same data, model and optimizer, one process after "
        "another, and report quality against cost. The same command goes on where it was stopped. "
        "An entry is what config.attention takes, with a label before = where one name is not "
        "enough: --attention=softmax,narrow=window,wide=window "
        "--config.attention.wide.window=1024 sets a field of the entry, or of the part of a "
        "pattern, that is called wide.",
        {
            **CONFIG,
            "attention": Flag("the entries, such as softmax,window,window+softmax", example="LIST"),
            "workdir": Flag(
                "directory of the comparison; each entry has its own in it", example="DIR"
            ),
        },
        configured=True,
    ),
    "sweep": Command(
        sweep,
        "Train every config of a list, which the get_config of a Python file returns, each in a "
        "process and a directory of its own, and write a table. The same command goes on where it "
        "was stopped and skips what is finished; what fails does not stop the rest. "
        "With --slurm nothing is run or submitted: a script for a job array is written, and the "
        "sbatch command for what is not finished is printed; its head may be edited and is kept.",
        {
            **CONFIG,
            "workdir": Flag("directory of the sweep; each point has its own in it", example="DIR"),
            "workers": Flag("processes at a time (default 1)", int, "K"),
            "slurm": Flag("write a script for SLURM instead", bool),
        },
        "[FILE[:ARG]]",
        configured=True,
    ),
    "needle": Command(
        needle,
        "Plant a random string in held-out text and measure how well a run recalls it.",
        {
            **WORKDIR,
            "length": Flag("tokens of a window; default that of training", int, "N"),
            "samples": Flag("windows per distance (default 32)", int, "S"),
            "seed": Flag("of texts and strings", int, "N"),
            **STEP,
        },
    ),
    "dilution": Command(
        dilution,
        "How attention spreads as the keys in sight grow in number: of every normaliser, with one "
        "key that matters; or, with --workdir, of every layer and head of a run on held-out text. "
        "Writes CSV files and pictures.",
        {
            **WORKDIR,
            "length": Flag(
                "most keys in sight; default 65,536, or what the run was trained at", int, "N"
            ),
            "samples": Flag("draws of the noise, or windows of text (default 32)", int, "S"),
            "seed": Flag("of the noise", int, "N"),
            "out": Flag("directory to write in; default dilution, in the workdir", example="DIR"),
            **STEP,
        },
    ),
    "bench": Command(
        bench,
        "Time, memory and growth of mechanisms by length, each measurement in a process of its "
        "own; with --peers also of the packages that are installed, called in turn with ours. "
        "Sizes are those of the config: by default one sequence and four heads of 64.",
        {
            **CONFIG,
            "attention": Flag("the entries, such as softmax,window", example="LIST"),
            "lengths": Flag("tokens, such as 1024,4k,64k", example="LIST"),
            "positions": Flag("position modules; default that of the config", example="LIST"),
            "mode": Flag("fwd, fwdbwd (default), train or decode", example="MODE"),
            "peers": Flag("measure the packages of others beside", bool),
            "threads": Flag("processors to keep to; default all", int, "N"),
            "repeats": Flag("calls of each; fewer where they are long (default 7)", int, "N"),
            "out": Flag("directory to write in (default runs/bench)", example="DIR"),
        },
        configured=True,
    ),
    "plan": Command(
        plan,
        "Parameters, FLOPs, memory, epochs of a config; refuses what cannot run. Compiles nothing.",
        {**CONFIG, **WORKDIR},
        configured=True,
    ),
    "export": Command(
        export,
        "Write the parameters of a run, with its config, to a .safetensors file.",
        {**WORKDIR, "to": Flag("file to write", example="FILE.safetensors"), **STEP},
    ),
    "import": Command(
        import_weights,
        "Make a new run that begins with the parameters of a .safetensors file: attnlab train goes "
        "on from it. The config is that of the file, or --config, which may name another mechanism "
        "or task. Says what matched; nothing is ever cast.",
        {
            **CONFIG,
            "workdir": Flag("directory of the new run", example="DIR"),
            "allow_partial": Flag("begin although some names match nothing", bool),
        },
        "FILE.safetensors",
        configured=True,
    ),
    "list": Command(
        list_known,
        "What can be chosen, of all kinds or of one; or all about one NAME.",
        {},
        "[mechanisms|positions|normalisers|tasks|corpora|NAME]",
    ),
    "data": Command(
        data, "Corpora: list them, get one, or describe one.", {}, "list|get|info [NAME]"
    ),
    "launch": Command(
        launch,
        "Run train or evaluate as several processes on this machine, K of D virtual CPU devices "
        "each, as if each were a host. The first that fails ends all and gives the exit code.",
        {"local": Flag("processes and devices of each, such as 2x2", example="KxD")},
        "-- train|evaluate [flags]",
    ),
    "report": Command(
        report,
        "Compare finished runs, or the points of one sweep.",
        {"out": Flag("file to write", example="FILE")},
        "WORKDIR...",
    ),
}


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


def _of_attention(path: str) -> bool:
    return path == "attention" or path.startswith("attention.")


def _config(line: Line):
    """The config of ``--config``, else that of the workdir, with the overrides, validated."""
    from attnlab.overrides import load
    from attnlab.workdir import Workdir

    if "config" in line.flags or "workdir" not in line.flags:
        file = line.need("config", "configs/quickstart.py")
    else:
        file = str(Workdir.existing(line.flags["workdir"]).path / "config.json")
    config = load(file)
    _change(config, line)
    return config


def _change(config, line: Line) -> None:
    """Sets what the line says of single fields, in place, and validates the whole."""
    from attnlab.limits import validate
    from attnlab.overrides import override

    for path, text in line.overrides:
        override(config, path, text)
    validate(config)


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
