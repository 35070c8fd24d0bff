"""A split reads like one line of bytes, in bounded memory."""

from hypothesis import given
from hypothesis import strategies as st

from attnlab.data.textset import RECORD_OVERHEAD, Index, TextSplit, record_reader

PIECES = st.lists(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=4), max_size=6)


def make(documents, **options):
    flat = [piece for document in documents for piece in document]
    names = tuple(f"d{n}" for n in range(len(documents)))
    index = Index(names, tuple(map(len, documents)), tuple(map(len, flat)))
    return TextSplit(index, lambda number: flat[number], **options)


@given(PIECES, st.data())
def test_any_range_is_that_of_the_joined_records(documents, data):
    split = make(documents)
    line = b"".join(piece for document in documents for piece in document)
    assert split.size == len(line)
    start = data.draw(st.integers(0, len(line)))
    stop = data.draw(st.integers(start, len(line)))
    assert split.read(start, stop).tobytes() == line[start:stop]


@given(PIECES)
def test_documents_are_their_records_joined(documents):
    expected = [(f"d{n}", b"".join(pieces)) for n, pieces in enumerate(documents)]
    assert list(make(documents)) == expected


def test_the_cache_keeps_the_records_used_last():
    reads = []
    pieces = [bytes([n]) * 10 for n in range(8)]
    index = Index(("d",), (8,), (10,) * 8)

    def read(number):
        reads.append(number)
        return pieces[number]

    split = TextSplit(index, read, cache_bytes=3 * (10 + RECORD_OVERHEAD))
    for number in (0, 1, 2, 1, 2, 0):
        split.record(number)
    assert reads == [0, 1, 2]
    split.record(3)
    split.record(0)
    assert reads == [0, 1, 2, 3]
    split.record(1)
    assert reads == [0, 1, 2, 3, 1]


def test_a_record_larger_than_the_cache_is_still_read():
    split = make([[b"x" * 100, b"y" * 100]], cache_bytes=1)
    assert split.document(0) == b"x" * 100 + b"y" * 100


def test_text_features_of_every_type_are_read_as_bytes():
    import numpy as np

    rows = [{"t": "é"}, {"t": b"\xff"}, {"t": np.frombuffer(b"abc", np.uint8)}]
    read = record_reader(rows, "t")
    assert [read(n) for n in range(3)] == ["é".encode(), b"\xff", b"abc"]
