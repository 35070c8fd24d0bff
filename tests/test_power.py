"""Power attention: what one layer sees, and how far several layers reach."""

from math import comb

import jax
import numpy as np
import pytest
from battery.cases import DIMS
from test_blockwise import reached, tokens, visible_tiles

from attnlab.core import Keys, Queries, Rule
from attnlab.errors import UserError
from attnlab.mechanisms.power import Power, Powers


def mask(power, length, causal=True):
    """The equation, a pair at a time."""
    i, j = np.indices((length, length))
    far = abs(i // power.block - j // power.block)
    seen = (far < power.window) | np.isin(far, 2 ** np.arange(20)) | (j < power.sinks * power.block)
    return seen & ((j <= i) | (not causal))


EXAMPLES = (Power(2, 3), Power(1, 1, 0), Power(3, 2, 2), Power(5, 9, 1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("power", EXAMPLES, ids=str)
def test_what_is_seen_is_the_window_the_powers_and_the_sinks(power, causal):
    queries, keys = tokens(N=50, M=50, B=1)
    pos = np.arange(50, dtype=np.int32)[None]
    place = {"pos": pos, "seg": pos * 0}
    rule = Rule(causal=causal).restrict(Powers(power.block, power.window, power.sinks))
    seen = rule.allowed(queries._replace(**place), keys._replace(**place))[0]
    np.testing.assert_array_equal(seen, mask(power, 50, causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("power", EXAMPLES, ids=str)
def test_flops_count_every_visible_pair_once(power, causal):
    per_pair = 2 * DIMS.heads * (DIMS.key_dim + DIMS.value_dim)
    for length in (1, 2, 3, 7, 24, 50, 64):
        pairs = np.sum(mask(power, length, causal))
        assert power.flops(DIMS, length, causal) == per_pair * pairs


@pytest.mark.parametrize("pattern", [Powers(1, 1, 0), Powers(3, 2, 1)], ids=str)
def test_reach_never_misses_a_visible_pair(pattern):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        queries, keys = tokens(N=24, M=24, B=1)
        where = {
            "pos": rng.integers(0, 70, (1, 24), np.int32),
            "seg": rng.integers(-1, 2, (1, 24), np.int32),
        }
        queries, keys = queries._replace(**where), keys._replace(**where)
        for causal in (True, False):
            rule = Rule(causal=causal).restrict(pattern)
            seen = visible_tiles(rule, queries, keys, 4)
            assert not np.any(seen & ~reached(rule, queries, keys, 4))


def reach(seen, layers):
    """Tokens that the last one meets through 1, 2, ... layers of the same mask."""
    met, counts = np.eye(len(seen), dtype=bool)[-1], []
    for _ in range(layers):
        met = met @ seen
        counts.append(int(met.sum()))
    return counts


def test_the_reach_grows_as_published_figures_of_it_do():
    assert reach(mask(Power(1, 5, 1), 128), 6) == [10, 35, 75, 110, 126, 128]
    assert reach(mask(Power(1, 5, 1), 512), 8)[-2:] != [512, 512]
    assert reach(mask(Power(1, 5, 1), 512), 8)[-1] == 512
    i, j = np.indices((128, 128))
    window = (j <= i) & ((i - j < 9) | (j < 1))
    assert reach(window, 4) == [10, 18, 26, 34]


def test_powers_alone_reach_by_the_digits_of_the_distance():
    """After L layers the distances with at most L digits 1 in binary: sums of binomials."""
    wanted = np.cumsum([comb(10, layer) for layer in range(11)])[1:]
    assert reach(mask(Power(1, 1, 0), 1024), 10) == wanted.tolist()


def test_gradients_reach_as_far_as_the_masks_say():
    """Of the last output of 1, 2, 3 layers with respect to the values below the first."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 128, 1, 2), np.float32) for _ in range(3))
    pos = np.arange(128, dtype=np.int32)[None]

    @jax.jit
    def pull(cotangent):
        def layer(v):
            return Power(1, 5, 1)({}, Queries(q, pos, pos * 0), Keys(k, v, pos, pos * 0), Rule())

        return jax.vjp(lambda v: layer(v).out, v)[1](cotangent)[0]

    cotangent = np.zeros_like(v)
    cotangent[0, -1] = 1
    for wanted in (10, 35, 75):
        cotangent = pull(cotangent)
        assert np.sum(np.any(np.asarray(cotangent[0, :, 0]) != 0, -1)) == wanted


@pytest.mark.parametrize("fields", [{"block": 0}, {"window": 0}, {"sinks": -1}])
def test_sizes_that_show_nothing_are_refused(fields):
    with pytest.raises(UserError, match="power"):
        Power(**fields)
