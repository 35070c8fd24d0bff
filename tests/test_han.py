"""Words, sentences, paragraphs: found where the text has them, and each token counted once."""

from dataclasses import replace

import numpy as np
import pytest
from battery.calls import assert_close, quick_outputs
from battery.cases import Case, draw
from battery.covering import check_covered, swapped

from attnlab.core import Keys
from attnlab.data.tokenizers import ByteTokenizer, marks_of
from attnlab.engines import units
from attnlab.mechanisms.han import Han
from attnlab.mechanisms.softmax import Softmax
from attnlab.positions.none import NoPosition

TEXT = b"ab cd. e f!\ng h i"
CASE = Case(Han(), NoPosition())


def marks(text):
    table = np.frombuffer(marks_of(ByteTokenizer()), np.uint8)
    return table[np.frombuffer(text, np.uint8)].astype(np.int32)


def read(text, case=CASE):
    """Random tokens with the marks of a text, in both rows."""
    return draw(case, length=len(text))._replace(unit=np.tile(marks(text), (2, 1)))


def test_units_are_those_of_the_text():
    pos = np.arange(len(TEXT), dtype=np.int32)[None]
    feature = np.zeros((1, len(TEXT), 1, 2), np.float32)
    found = units.numbered(Keys(feature, feature, pos, 0 * pos, unit=marks(TEXT)[None]))

    def pieces(level):
        numbers = np.asarray(found.above[level, 0])
        chars = np.frombuffer(TEXT, np.uint8)
        return [bytes(chars[numbers == n]) for n in range(numbers.max() + 1)]

    assert pieces(0) == [b"ab ", b"cd.", b" ", b"e ", b"f!", b"\n", b"g ", b"h ", b"i"]
    assert pieces(1) == [b"ab cd.", b" e f!", b"\n", b"g h i"]
    assert pieces(2) == [b"ab cd. e f!\n", b"g h i"]
    assert pieces(3) == [TEXT]


@pytest.mark.parametrize("causal", [True, False])
def test_a_uniform_query_sees_every_token_once(causal):
    check_covered(replace(CASE, causal=causal))


def test_without_marks_it_is_softmax():
    inputs = draw(CASE)._replace(unit=None)
    wanted = quick_outputs(replace(CASE, mechanism=Softmax()), inputs, "reference")
    assert_close(quick_outputs(CASE, inputs), wanted)


def test_order_counts_inside_a_word_and_not_once_it_is_finished():
    """Tokens 0 and 1 are one word; 0 and 3 are not, though of one sentence."""
    inputs = read(TEXT)
    before = quick_outputs(CASE, inputs)

    def after(a, b):
        return quick_outputs(
            CASE, inputs._replace(k=swapped(inputs.k, a, b), v=swapped(inputs.v, a, b))
        )

    assert_close(after(0, 1)[:, 2:], before[:, 2:])
    assert np.any(np.abs(after(0, 1)[:, 0] - before[:, 0]) > 1e-3)
    assert np.any(np.abs(after(0, 3)[:, 6:] - before[:, 6:]) > 1e-3)
