"""One budget for every mechanism: long sequences, a small model, minutes on a CPU or a GPU.

attnlab compare --config=configs/compare.py --attention=softmax,window --workdir=runs/compared

Keys after the colon: machine (cpu: 2,048 bytes, 0.46 M parameters; gpu: 8,192 bytes, 26 M
parameters, bfloat16), position, corpus.
"""

from attnlab.config import base, parse_arg, pick


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, machine="cpu", position="rope", corpus="")
    config = base("softmax", chosen.position)
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.final_fraction = 0.02
    config.train.tensorboard = False
    config.train.log_every = 5
    config.train.keep = 1
    config.sample.temperature = 0.8
    pick("machine", chosen.machine, {"cpu": _cpu, "gpu": _gpu})(config)
    config.task.corpus = chosen.corpus or config.task.corpus
    return config


def _cpu(config):
    config.task.length = 2048
    config.task.batch = 2
    config.model.width = 128
    config.model.layers = 2
    config.optimizer.warmup = 20
    config.train.steps = 180
    config.train.eval_every = 60
    config.train.save_every = 60
    config.evaluate.batch = 2
    config.evaluate.tokens = 32768


def _gpu(config):
    config.task.corpus = "sympy"
    config.task.length = 8192
    config.task.batch = 8
    config.model.width = 512
    config.model.layers = 8
    config.model.heads = 8
    config.model.kv_heads = 8
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 0.01
    config.optimizer.warmup = 50
    config.train.steps = 300
    config.train.eval_every = 100
    config.train.save_every = 150
    config.evaluate.batch = 8
    config.evaluate.tokens = 2**20
