"""Sampling from a trained run: prefill the prompt, then one token a call from a fixed buffer."""

import codecs
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core import MASK, Array
from attnlab.errors import UserError
from attnlab.model import Memory, Transformer, initial_memory


def draw(logits: Array, key: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """One token id per row of ``logits`` [B V].

    ``temperature`` 0 takes the likeliest; ``top_k`` keeps the k likeliest (0 or > V: all);
    ``top_p`` then keeps the fewest likeliest tokens whose probabilities sum to at least p.
    """
    size = logits.shape[-1]
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, -1)
    ranked /= jnp.where(temperature > 0, temperature, 1.0)
    keep = jnp.arange(size) < jnp.where(top_k > 0, top_k, size)
    probs = jax.nn.softmax(jnp.where(keep, ranked, MASK))
    keep &= jnp.cumsum(probs, -1) - probs < top_p
    keep |= jnp.arange(size) == 0
    rank = jax.random.categorical(key, jnp.where(keep, ranked, MASK))
    rank = jnp.where(temperature > 0, rank, 0)
    return jnp.take_along_axis(order, rank[:, None], -1)[:, 0]


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def extend(
    model: Transformer, params: Any, tokens: Array, memory: tuple[Memory, ...]
) -> tuple[Array, tuple[Memory, ...]]:
    """Logits [B V] after ``tokens`` [B N] appended to what ``memory`` holds, and the new memory."""
    B, N = tokens.shape
    pos = jnp.broadcast_to(memory[0].used + jnp.arange(N), (B, N))
    logits, extras = model.apply({"params": params}, tokens, pos, jnp.ones_like(pos), memory)
    return logits[:, -1], extras.memory


_draw = jax.jit(draw)


def stream_tokens(
    model: Transformer,
    params: Any,
    prompt: np.ndarray,
    *,
    context: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Token ids after ``prompt`` [n], without end.

    At most ``context`` tokens are in sight: when they are used up, the newest half is read again as
    if a text began there, since positions beyond the training length are not to be trusted. Raises
    `UserError` for an empty or too long prompt, an id that the model does not have, or a sampling
    setting out of range.
    """
    if not 0 < len(prompt) <= context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, the model was trained on {context}; "
            "use between 1 and that many"
        )
    if prompt.min() < 0 or prompt.max() >= model.vocab_size:
        raise UserError(
            f"token id {prompt.max() if prompt.min() >= 0 else prompt.min()} in the prompt is "
            f"outside the vocabulary 0..{model.vocab_size - 1}"
        )
    for name, value, legal in (
        ("temperature", temperature, 0 <= temperature < float("inf")),
        ("top_k", top_k, top_k >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
    ):
        if not legal:
            limits = {"temperature": ">= 0", "top_k": ">= 0 (0 = off)", "top_p": "in (0, 1]"}
            raise UserError(f"{name}={value}: must be {limits[name]}")
    settings = (jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
    key, count, seen = jax.random.key(seed), 0, list(map(int, prompt))

    def read(tokens: list[int]):
        memory = initial_memory(model.architecture, model.mechanisms, 1, context)
        return extend(model, params, jnp.asarray([tokens], jnp.int32), memory)

    logits, memory = read(seen)
    while True:
        token = int(_draw(logits, jax.random.fold_in(key, count), *settings)[0])
        yield token
        count += 1
        if len(seen) == context:
            seen = seen[-(context // 2) :] if context > 1 else []
            logits, memory = read([*seen, token])
        else:
            logits, memory = extend(model, params, jnp.full((1, 1), token, jnp.int32), memory)
        seen.append(token)


def sample_text(model: Transformer, params: Any, tokenizer: Any, settings: Any, **options) -> bytes:
    """The prompt of ``settings`` (`config.sample`) and its continuation, to the end of the document
    or ``settings.tokens``."""
    prompt = settings.prompt.encode()
    ids = np.concatenate([[tokenizer.boundary], tokenizer.encode(prompt)])
    tokens = stream_tokens(
        model,
        params,
        ids,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        **options,
    )
    drawn = []
    for _, token in zip(range(settings.tokens), tokens):
        if token == tokenizer.boundary:
            break
        drawn.append(token)
    return prompt + tokenizer.decode(np.asarray(drawn, np.int32))


def generate(
    workdir: str | Path,
    prompt: str | None = None,
    tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    step: int | None = None,
) -> None:
    """Continues ``prompt`` with the run in ``workdir``, streaming to standard output; what is not
    given is taken from `config.sample`. Ends early where the model ends the document."""
    from attnlab.runs import open_run

    run = open_run(workdir, step)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = {k: run.config.sample[k] if v is None else v for k, v in given.items()}
    prompt = run.config.sample.prompt if prompt is None else prompt
    count = run.config.sample.tokens if tokens is None else tokens
    if count < 0:
        raise UserError(f"tokens={count} must be at least 0")
    text = prompt.encode(errors="surrogateescape")
    ids = np.concatenate([[run.tokenizer.boundary], run.tokenizer.encode(text)])
    stream = stream_tokens(
        run.model, run.params, ids, context=run.config.task.length, seed=seed, **options
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sys.stdout.write(decoder.decode(text))
    for _, token in zip(range(count), stream):
        if token == run.tokenizer.boundary:
            break
        sys.stdout.write(decoder.decode(run.tokenizer.decode(np.asarray([token]))))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
