"""Sampling from a trained run: prefill the prompt, then one token a call from a fixed buffer."""

import codecs
import itertools
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.carry import carries
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
    # The largest becomes 0, so that no temperature overflows.
    ranked = (ranked - ranked[..., :1]) / jnp.where(temperature > 0, temperature, 1.0)
    keep = jnp.arange(size) < jnp.where(top_k > 0, top_k, size)
    probs = jax.nn.softmax(jnp.where(keep, ranked, MASK))
    keep &= (jnp.cumsum(probs, -1) - probs < top_p) | (top_p >= 1)  # rounding may pass 1
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
    out: Any = model.apply({"params": params}, tokens, pos, jnp.ones_like(pos), memory)
    logits, extras = out
    return logits[:, -1], extras.memory


_draw = jax.jit(draw)


def prompt_ids(prompt: str, tokenizer: Any) -> np.ndarray:
    """Token ids of a prompt at the start of a document, from the bytes that were typed."""
    text = prompt.encode(errors="surrogateescape")
    return np.concatenate([[tokenizer.boundary], tokenizer.encode(text)])


def check_prompt(prompt: np.ndarray, context: int) -> None:
    """Raises `UserError` for a prompt [n] that is empty or longer than the context."""
    if not 0 < len(prompt) <= context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens with its start mark, the model is trained on "
            f"{context}; use between 1 and that many"
        )


def _check_settings(
    prompt: np.ndarray, vocab_size: int, temperature: float, top_k: int, top_p: float
) -> None:
    outside = prompt[(prompt < 0) | (prompt >= vocab_size)]
    if outside.size:
        raise UserError(
            f"token id {outside[0]} in the prompt is outside the vocabulary 0..{vocab_size - 1}"
        )
    for name, value, fine, legal in (
        ("temperature", temperature, 0 <= temperature < float("inf"), ">= 0"),
        ("top_k", top_k, top_k >= 0, ">= 0 (0 = off)"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not fine:
            raise UserError(f"{name}={value}: must be {legal}")


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
    if a text began there, since positions beyond the training length are not to be trusted. A model
    that is `endless` goes on from its memory instead and reads every token once. Raises
    `UserError`, at once and not at the first token, for an empty or too long prompt, an id that
    the model does not have, or a sampling setting out of range.
    """
    prompt = np.asarray(prompt)
    check_prompt(prompt, context)
    _check_settings(prompt, model.vocab_size, temperature, top_k, top_p)
    settings = (jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
    return _stream(model, params, list(map(int, prompt)), context, settings, jax.random.key(seed))


def endless(model: Transformer) -> bool:
    """Whether a text may outgrow the length of training: no layer keeps all keys, and later
    positions either look like earlier ones or were trained, on rows that read on."""
    memory = jax.eval_shape(lambda: initial_memory(model.architecture, model.mechanisms, 1, 1))
    relative = model.position.relative and all(m.relative for m in model.mechanisms)
    return all(past.keys is None for past in memory) and (relative or carries(model))


def _stream(
    model: Transformer,
    params: Any,
    seen: list[int],
    context: int,
    settings: tuple[Array, Array, Array],
    key: Array,
) -> Iterator[int]:
    count, full = 0, math.inf if endless(model) else context

    def read(tokens: list[int]):
        memory = initial_memory(model.architecture, model.mechanisms, 1, context)
        return extend(model, params, jnp.asarray([tokens], jnp.int32), memory)

    logits, memory = read(seen)
    while True:
        token = int(_draw(logits, jax.random.fold_in(key, count), *settings)[0])
        yield token
        count += 1
        if len(seen) == full:
            seen = seen[-(context // 2) :] if context > 1 else []
            logits, memory = read([*seen, token])
        else:
            logits, memory = extend(model, params, jnp.full((1, 1), token, jnp.int32), memory)
        seen.append(token)


def sample_text(model: Transformer, params: Any, tokenizer: Any, settings: Any, **options) -> bytes:
    """The prompt of ``settings`` (`config.sample`) and its continuation, to the end of the document
    or ``settings.tokens``."""
    ids = prompt_ids(settings.prompt, tokenizer)
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
    for token in itertools.islice(tokens, settings.tokens):
        if token == tokenizer.boundary:
            break
        drawn.append(token)
    return tokenizer.decode(np.asarray([*ids, *drawn], np.int32))


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
    run.need_text()
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = {k: run.config.sample[k] if v is None else v for k, v in given.items()}
    count = run.config.sample.tokens if tokens is None else tokens
    if count < 0:
        raise UserError(f"tokens={count} must be at least 0")
    ids = prompt_ids(run.config.sample.prompt if prompt is None else prompt, run.tokenizer)
    stream = stream_tokens(
        run.model, run.params, ids, context=run.config.task.length, seed=seed, **options
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sys.stdout.write(decoder.decode(run.tokenizer.decode(ids)))
    for token in itertools.islice(stream, count):
        if token == run.tokenizer.boundary:
            break
        sys.stdout.write(decoder.decode(run.tokenizer.decode(np.asarray([token]))))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
