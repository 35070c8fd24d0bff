"""Transformer-XL: a cache that is long enough is the whole past."""

import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import BATCH, LENGTH, Case, draw
from battery.network import forward, network_of, parameters_of, tokens_of

from attnlab.core import Rule
from attnlab.engines import dense, segments
from attnlab.errors import UserError
from attnlab.mechanisms.softmax import Softmax
from attnlab.mechanisms.transformer_xl import TransformerXL
from attnlab.model import initial_memory
from attnlab.positions.alibi import Alibi
from attnlab.positions.rope import Rope


@pytest.mark.parametrize("position", [Rope(), Alibi()], ids=repr)
def test_a_memory_of_the_whole_past_is_one_causal_pass_at_any_depth(position):
    """T1: three layers, eight segments, one call after the other."""
    case = Case(TransformerXL(segment=4, memory=LENGTH), position)
    network = network_of(case, layers=3)
    params, (tokens, pos, seg) = parameters_of(network), tokens_of()
    whole, _ = forward(network_of(Case(Softmax(), position), layers=3), params, tokens, pos, seg)
    memory = initial_memory(network.architecture, network.mechanisms, BATCH, LENGTH)
    outs = []
    for start in range(0, LENGTH, 4):
        part = slice(start, start + 4)
        logits, extras = forward(
            network, params, tokens[:, part], pos[:, part], seg[:, part], memory
        )
        memory = extras.memory
        outs.append(np.asarray(logits))
    assert_close(np.concatenate(outs, 1), whole, 1e-5)


def test_no_memory_is_attention_inside_blocks():
    case = Case(TransformerXL(segment=6, memory=0), Rope())
    inputs = draw(case)
    rule = Rule(position=Rope()).restrict(segments.own(6))
    wanted, *_ = dense.attend(inputs.queries(), inputs.keys(), rule)
    assert_close(outputs(case, inputs), wanted)


def test_every_token_sees_its_segment_and_the_memory_before_it():
    """Which values move which outputs: the first of a segment sees memory + 1, the last memory +
    segment."""
    case = Case(TransformerXL(segment=4, memory=3), Rope())
    inputs = draw(case, batch=1, length=16)
    before = np.asarray(outputs(case, inputs))
    for j in range(16):
        v = inputs.v.copy()
        v[:, j] += 1
        moved = np.any(np.asarray(outputs(case, inputs._replace(v=v))) != before, (0, 2, 3))
        wanted = [j <= i and j >= i // 4 * 4 - 3 for i in range(16)]
        assert moved.tolist() == wanted


@pytest.mark.parametrize("fields", [{"segment": 0}, {"memory": -1}])
def test_sizes_without_meaning_are_refused(fields):
    with pytest.raises(UserError, match="transformer_xl"):
        TransformerXL(**fields)
