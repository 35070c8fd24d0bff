"""A sequence in one piece == the same sequence in pieces: training and decoding are one call."""

from functools import partial

import jax
import numpy as np

from attnlab.core import Keys
from attnlab.model import initial_memory
from battery.calls import DRAWING, assert_close, quick_outputs
from battery.cases import BATCH, DIMS, LENGTH, Case, Inputs, documents, draw
from battery.network import forward, network_of, parameters_of, tokens_of
from battery.refusal import causal_only

PIECES = ((16, 16), (5, 16, 1, 5, 5), (1,) * LENGTH)


@causal_only
def check_extension(case: Case) -> None:
    """forward == extend for halves, uneven pieces and single tokens, with a change of
    document in the middle of a piece; the state never changes shape."""
    inputs = documents(draw(case), (13, 19), (20, 12))
    whole = quick_outputs(case, inputs)
    for pieces in PIECES:
        assert sum(pieces) == LENGTH
        assert_close(extend(case, inputs, pieces), whole, what=f"pieces of {pieces}")


def extend(case: Case, inputs: Inputs, pieces: tuple[int, ...]) -> np.ndarray:
    """``out`` of all pieces, one after the other.

    A mechanism without a state of its own is given a buffer of all keys, filled as far as they
    are known; one with a state is given the new tokens only.
    """
    state = case.mechanism.initial_state(DIMS, BATCH)
    shapes, start, outs = jax.tree.map(np.shape, state), 0, []
    for piece in pieces:
        part = inputs.tokens(lambda z, a=start, b=start + piece: z[:, a:b])
        written = np.arange(LENGTH) < start + piece
        known = inputs.keys()._replace(seg=np.where(written, inputs.seg, -1))
        whole = state == () or case.mechanism.recalls
        out, state = step(case, part, known if whole else part.keys(), state)
        assert jax.tree.map(np.shape, state) == shapes, "the state changed its shape"
        outs.append(np.asarray(out))
        start += piece
    return np.concatenate(outs, 1)


@partial(jax.jit, static_argnums=0)
def step(case: Case, new: Inputs, keys: Keys, state):
    """One call that continues from ``state``."""
    params, place = new.params
    key = jax.random.key(DRAWING)
    rule = case.rule(place)
    result = case.mechanism(params, new.queries(), keys, rule, state, x=new.x, key=key)
    return result.out, result.state


@causal_only
def check_model_extension(case: Case) -> None:
    """The same through the Transformer and the memory it keeps."""
    network = network_of(case)
    params, (tokens, pos, seg) = parameters_of(network), tokens_of()
    whole, _ = forward(network, params, tokens, pos, seg)
    for pieces in PIECES:
        memory = initial_memory(network.architecture, network.mechanisms, BATCH, LENGTH)
        start, outs = 0, []
        for piece in pieces:
            span = slice(start, start + piece)
            logits, extras = forward(
                network, params, tokens[:, span], pos[:, span], seg[:, span], memory
            )
            memory, start = extras.memory, start + piece
            outs.append(np.asarray(logits))
        assert_close(np.concatenate(outs, 1), whole, what=f"pieces of {pieces}")
