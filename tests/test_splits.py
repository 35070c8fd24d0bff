"""Documents are held out by name, in whole, and every split gets some."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlab.data.splits import SPLITS, digest, read_splits, split_bytes, split_documents
from attnlab.errors import DataError


@given(st.lists(st.integers(1, 10**6), min_size=3, max_size=40))
def test_every_document_is_in_one_split_and_no_split_is_empty(sizes):
    documents = {f"document {n}": size for n, size in enumerate(sizes)}
    placed = split_documents(documents)
    assert set(placed) == set(documents)
    assert set(placed.values()) == set(SPLITS)


@given(st.permutations([f"{n}.txt" for n in range(12)]))
def test_the_split_depends_on_names_not_on_order(names):
    assert split_documents(dict.fromkeys(names, 100)) == split_documents(
        dict.fromkeys(sorted(names), 100)
    )


def test_equal_documents_hold_out_five_percent_each_in_hash_order():
    documents = dict.fromkeys((f"{n}" for n in range(100)), 50)
    placed = split_documents(documents)
    order = sorted(documents, key=digest)
    assert [n for n in order if placed[n] == "test"] == order[:5]
    assert [n for n in order if placed[n] == "validation"] == order[5:10]


def test_a_document_with_most_of_the_bytes_trains():
    for giant in "abcdefgh":
        sizes = dict.fromkeys("abcdefgh", 10) | {giant: 10_000}
        assert split_documents(sizes)[giant] == "train"


def test_two_documents_cannot_be_split_by_document():
    with pytest.raises(DataError, match="2 documents"):
        split_documents({"a": 1, "b": 2})


@given(st.integers(3, 10**7))
def test_byte_ranges_cover_a_document_without_overlap(size):
    ranges = [split_bytes(size)[split] for split in SPLITS]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == size
    assert all(start < stop for start, stop in ranges)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))


def test_names_that_say_their_split_are_believed():
    said = {"train/1.txt": "train", "valid/1.txt": "validation", "a/b/test/2.txt": "test"}
    assert read_splits(said) == said
    tokens = {
        f"wiki.{word}.tokens": split for word, split in zip(("train", "valid", "test"), SPLITS)
    }
    assert read_splits(tokens) == tokens
    assert read_splits(["train.txt", "validation.txt", "test.txt"]) is not None


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["train/1", "valid/1", "test/1", "other/1"],
        ["train/1", "test/1"],
        ["train/test.py", "valid/1", "test/1"],
        ["training/1", "valid/1", "test/1"],
    ],
)
def test_names_that_do_not_all_say_one_say_nothing(names):
    assert read_splits(names) is None
