"""Long and short: a window of tokens, and learned summaries of what is outside."""

from dataclasses import replace

import numpy as np
import pytest
from battery.calls import assert_close, quick_outputs
from battery.cases import Case, draw, initial

from attnlab.errors import UserError
from attnlab.mechanisms.long_short import LongShort
from attnlab.mechanisms.softmax import Softmax
from attnlab.mechanisms.window import Window
from attnlab.positions.none import NoPosition

CASE = Case(LongShort(segment=64, rank=2, window=32), NoPosition())


def normed(z):
    z = z - z.mean(-1, keepdims=True)
    return z / np.sqrt((z * z).mean(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("sizes", "limit"),
    [
        ({"segment": 64, "rank": 2, "window": 32}, Softmax()),  # no summary: all in the window
        ({"segment": 1, "rank": 1, "window": 1}, Softmax()),  # a summary is a token
        ({"segment": 64, "rank": 2, "window": 5}, Window(5)),  # the only segment is one's own
    ],
)
def test_its_limits_are_exact_attention_over_normed_tokens(sizes, limit, causal):
    case = replace(CASE, mechanism=LongShort(**sizes), causal=causal)
    inputs = draw(case)._replace(params=initial(case))
    plain = inputs._replace(params=({}, inputs.params[1]), k=normed(inputs.k), v=normed(inputs.v))
    wanted = quick_outputs(replace(case, mechanism=limit), plain, "reference")
    assert_close(quick_outputs(case, inputs), wanted)


def test_a_token_outside_the_window_is_seen_through_its_segment_only():
    """A window of 1 and segments of 8: token 2 reaches its own output and those from 8 on."""
    case = replace(CASE, mechanism=LongShort(segment=8, rank=1, window=1))
    inputs = draw(case)
    v = np.array(inputs.v)
    v[:, 2] += np.arange(v.shape[-1])
    moved = quick_outputs(case, inputs._replace(v=v)) != quick_outputs(case, inputs)
    assert np.flatnonzero(np.any(moved, (0, 2, 3))).tolist() == [2, *range(8, 32)]


@pytest.mark.parametrize("field", ["segment", "rank", "window"])
def test_sizes_are_positive(field):
    with pytest.raises(UserError, match=f"{field}=0"):
        LongShort(**{field: 0})
