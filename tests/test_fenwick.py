"""Log-linear attention: levels are those of a Fenwick tree, whatever the chunks and documents."""

from collections import Counter

import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, documents, draw

from attnlab.engines import recurrent
from attnlab.errors import UserError
from attnlab.mechanisms.fenwick import Fenwick, level_between, normalised
from attnlab.positions.none import NoPosition


def blocks(t):
    """The blocks of the past of t, nearest first, by the bits of t: {start: (level, length)}."""
    found, end = {}, t
    for level in range(1, t.bit_length() + 1):
        size = 1 << (level - 1)
        if t & size:
            end -= size
            found[end] = (level, size)
    return found


@pytest.mark.slow
def test_levels_are_the_blocks_of_a_fenwick_tree():
    for t in range(70):
        levels = np.asarray(level_between(np.int32(t), np.arange(t + 1, dtype=np.int32), 16))
        assert levels[t] == 0
        for start, (level, size) in blocks(t).items():
            assert set(levels[start : start + size]) == {level}
        assert Counter(levels.tolist()) == Counter(dict(blocks(t).values())) + Counter([0])


def test_the_level_of_a_pair_is_the_greater_of_the_levels_to_a_token_between():
    """What lets memories sorted for one token serve all later ones, also with few levels."""
    t = np.arange(40, dtype=np.int32)
    s, p, t = t[:, None, None], t[:, None], t
    between = np.broadcast_to((s <= p) & (p < t), (40, 40, 40))
    for levels in (1, 3, 16):
        direct = np.asarray(level_between(t, s, levels))
        through = np.maximum(level_between(t, p, levels), level_between(p, s, levels))
        assert np.array_equal(
            np.broadcast_to(direct, between.shape)[between],
            np.broadcast_to(through, between.shape)[between],
        )


def test_equal_levels_without_decay_are_linear_attention():
    case = Case(Fenwick(chunk=8), NoPosition())
    inputs = documents(draw(case), (13, 19), (30,))
    params = {name: np.zeros_like(z) for name, z in inputs.params[0].items()}
    params["gate_bias"] += 100
    got = outputs(case, inputs._replace(params=(params, inputs.params[1])))
    q = inputs.q * np.float32(np.log(2) / DIMS.key_dim**0.5)  # softplus(0) = log 2
    wanted, _ = recurrent.attend(q, inputs.k, inputs.v, inputs.seg, chunk=16)
    assert_close(got, normalised(wanted))


def test_the_last_level_takes_the_rest():
    """Levels beyond the last weigh as the last: few levels are many with equal weights."""
    few, many = (Case(Fenwick(levels=n, chunk=8), NoPosition()) for n in (3, 16))
    inputs = draw(few)
    repeated = {
        name: np.concatenate([z, *[z[..., -1:]] * 13], -1) if "level" in name else z
        for name, z in inputs.params[0].items()
    }
    wanted = outputs(many, inputs._replace(params=(repeated, inputs.params[1])))
    assert_close(outputs(few, inputs), wanted)


def test_a_level_without_weight_hides_its_block():
    """Values 0 to 3 are token 7's level 3 and token 12's level 4."""
    case = Case(Fenwick(chunk=4), NoPosition())
    inputs = draw(case)
    params = {name: np.array(z) for name, z in inputs.params[0].items()}
    params["level"][:] = 0
    params["level_bias"][:, 3] = -200
    inputs = inputs._replace(params=(params, inputs.params[1]))
    v = np.where(np.arange(32)[:, None, None] < 4, inputs.v + 1, inputs.v)
    moved = outputs(case, inputs) != outputs(case, inputs._replace(v=v))
    assert not np.any(moved[:, 7])
    assert np.any(moved[:, 12])


@pytest.mark.parametrize("fields", [{"levels": 0}, {"chunk": 0}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(UserError, match="fenwick"):
        Fenwick(**fields)
