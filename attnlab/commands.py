"""What can be typed after ``attnlab``: each command, its flags, and what it calls.

Nothing heavy is imported before a command runs.
"""

from attnlab import hosts
from attnlab.errors import UserError, did_you_mean
from attnlab.flags import Command, Flag, Line, parse_line


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
