"""The small Transformer once more in torch, which a training step is measured beside.

The same sizes, products, norms and optimizer, with torch's own attention and its fused AdamW;
queries, keys and values come from one product, as they do there.
"""

import importlib
import os
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from attnlab.bench.subjects import BYTES, Subject
from attnlab.config import architecture_of
from attnlab.errors import UserError
from attnlab.model import Architecture

EPSILON = 1e-6


def build(config: ConfigDict, length: int, compiled: bool = False) -> Subject:
    """An optimizer step on the same random tokens again and again; ``compiled`` by torch.compile.
    Raises `UserError` for what the twin has not."""
    check(config)
    torch = importlib.import_module("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    batch, a, o = config.task.batch, architecture_of(config), config.optimizer
    tokens = np.random.default_rng(0).integers(BYTES, size=(batch, length))
    tokens = torch.as_tensor(tokens)
    weights = draw(a)
    leaves = [w.requires_grad_() for layer in weights.values() for w in layer.values()]
    # As in `attnlab.optimizer.is_matrix`.
    matrices = [w for w in leaves if w.ndim == 2 and w is not weights["ends"]["embedding"]]
    others = [w for w in leaves if all(w is not z for z in matrices)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": o.weight_decay}, {"params": others}],
        lr=o.learning_rate,
        betas=(o.b1, o.b2),
        weight_decay=0.0,
        fused=True,
    )
    loss = torch.compile(nll) if compiled else nll

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(weights, tokens, tokens, a.heads, a.mlp).backward()
        if o.clip:
            torch.nn.utils.clip_grad_norm_(leaves, o.clip)
        optimizer.step()

    begun = time.perf_counter()
    call()
    return Subject(call, batch * length, 0.0, 0, time.perf_counter() - begun)


def check(config: ConfigDict) -> None:
    """Raises `UserError` for a config that asks for more than the twin does."""
    model, optimizer = config.model, config.optimizer
    wanted = {
        "position.name": (config.position.name, "none"),
        "model.kv_heads": (model.kv_heads or model.heads, model.heads),
        "model.dropout": (model.dropout, 0.0),
        "model.tied": (model.tied, True),
        "model.causal": (model.causal, True),
        "model.dtype": (model.dtype, "float32"),
        "optimizer.name": (optimizer.name, "adamw"),
        "optimizer.accumulate": (optimizer.accumulate, 1),
        "optimizer.ema": (optimizer.ema, 0.0),
    }
    for name, (given, known) in wanted.items():
        if given != known:
            raise UserError(f"--peers: the torch model has no {name}={given}, only {known}")


def draw(a: Architecture) -> dict[str, dict[str, Any]]:
    """Random weights, [out in] each."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    normed = ("query", "key") if a.qk_norm else ()
    inner, gates = a.heads * a.head_dim, 2 if a.mlp == "swiglu" else 1

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Any:
        return torch.randn(rows, columns) * (scale / columns) ** 0.5

    def layer() -> dict[str, Any]:
        return {
            "attention_norm": torch.ones(a.width),
            **{f"{name}_norm": torch.ones(a.head_dim) for name in normed},
            "qkv": matrix(3 * inner, a.width),
            "out": matrix(a.width, inner, 0.5 / a.layers),
            "mlp_norm": torch.ones(a.width),
            "gate_up": matrix(gates * a.mlp_width, a.width),
            "down": matrix(a.width, a.mlp_width, 0.5 / a.layers),
        }

    ends = {"embedding": matrix(BYTES, a.width), "norm": torch.ones(a.width)}
    return {f"layer_{i}": layer() for i in range(a.layers)} | {"ends": ends}


def nll(weights: dict[str, dict[str, Any]], tokens: Any, targets: Any, heads: int, mlp: str) -> Any:
    """The mean loss of ``targets`` [B N], in nats."""
    functional = importlib.import_module("torch").nn.functional
    table = weights["ends"]["embedding"]

    def norm(x: Any, scale: Any) -> Any:
        return functional.rms_norm(x, scale.shape, scale, EPSILON)

    x = functional.embedding(tokens, table) * table.shape[1] ** 0.5
    for i in range(len(weights) - 1):
        w = weights[f"layer_{i}"]
        z = functional.linear(norm(x, w["attention_norm"]), w["qkv"])
        q, k, v = z.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        if "query_norm" in w:
            q, k = norm(q, w["query_norm"]), norm(k, w["key_norm"])
        z = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + functional.linear(z.transpose(1, 2).flatten(2), w["out"])
        z = functional.linear(norm(x, w["mlp_norm"]), w["gate_up"])
        if mlp == "swiglu":
            gate, up = z.chunk(2, -1)
            z = functional.silu(gate) * up
        else:
            z = functional.gelu(z, approximate="tanh")
        x = x + functional.linear(z, w["down"])
    logits = functional.linear(norm(x, weights["ends"]["norm"]), table)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
