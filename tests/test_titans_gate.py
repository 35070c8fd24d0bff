"""Attention in a window, gated by a memory: what each part gives alone."""

import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import Case, draw

from attnlab.core import positions
from attnlab.errors import UserError
from attnlab.mechanisms.titans_gate import TitansGate

WINDOW, SLOTS = 5, 2
CASE = Case(TitansGate(window=WINDOW, persistent=SLOTS, chunk=8), positions.get("none")())


def closed(inputs):
    """A gate that is open by a half, whatever the memory answers."""
    params, place = inputs.params
    norm = params["norm"] | {"memory": 0 * params["norm"]["memory"]}
    return inputs._replace(params=(params | {"norm": norm}, place))


def test_a_gate_that_does_not_listen_leaves_half_of_normed_attention():
    inputs = closed(draw(CASE))
    params, _ = inputs.params
    q, k, v = inputs.q, np.repeat(inputs.k, 2, 2), np.repeat(inputs.v, 2, 2)
    slots_k, slots_v = (np.repeat(params["persistent"][z], 2, 1) for z in ("key", "value"))
    z = np.concatenate(
        [np.einsum("bnhd,phd->bhnp", q, slots_k), np.einsum("bnhd,bmhd->bhnm", q, k)], -1
    )
    i, j = np.arange(32)[:, None], np.arange(32)
    seen = np.concatenate([np.ones((32, SLOTS), bool), (j <= i) & (j > i - WINDOW)], -1)
    weight = np.where(seen, np.exp(z * 8**-0.5), 0)
    probs = weight / np.sum(weight, -1, keepdims=True)
    y = np.einsum("bhnp,phe->bnhe", probs[..., :SLOTS], slots_v)
    y += np.einsum("bhnm,bmhe->bnhe", probs[..., SLOTS:], v)
    normed = y / np.sqrt(np.mean(y * y, -1, keepdims=True)) * params["norm"]["attention"]
    assert_close(outputs(CASE, inputs), normed / 2)


def test_what_the_window_has_left_behind_is_seen_through_the_memory_alone():
    inputs = draw(CASE)
    v = inputs.v.copy()
    v[:, 0] += 1
    for each, known in ((inputs, True), (closed(inputs), False)):
        before, after = (outputs(CASE, z) for z in (each, each._replace(v=v)))
        assert np.all(np.any(before[:, :WINDOW] != after[:, :WINDOW], (2, 3)))
        assert np.all(np.any(before[:, WINDOW:] != after[:, WINDOW:], (2, 3)) == known)


@pytest.mark.parametrize("fields", [{"window": 0}, {"persistent": -1}, {"rate": 0}, {"chunk": 0}])
def test_sizes_that_make_no_sense_are_refused(fields):
    with pytest.raises(UserError, match="titans_gate"):
        TitansGate(**fields)
