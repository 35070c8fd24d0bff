"""Whatever the bytes, tokens bring them back exactly."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.data import bpe, places
from attnlab.data.textset import Index, TextSet, TextSplit
from attnlab.data.tokenizers import ByteTokenizer, load, make_tokenizer, marks_of
from attnlab.errors import DataError, UserError
from attnlab.manifest import write_manifest

PROSE = b"In the beginning God created the heaven and the earth. \xc3\xa9\xff\0\r\n" * 40


def text_set(cache, train=PROSE, test=b"the earth was without form"):
    """A text set of one document per split, in memory."""

    def split(content):
        return TextSplit(Index(("d",), (1,), (len(content),)), lambda _: content)

    return TextSet(
        {"train": split(train), "validation": split(test), "test": split(test)}, {}, cache
    )


@pytest.fixture(scope="module")
def trained():
    return bpe.train("bpe:300", iter([PROSE]))


@given(st.binary())
def test_bytes_round_trip(content):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(content)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(content)
    assert tokenizer.decode(ids) == content


@given(st.one_of(st.binary(), st.text().map(str.encode)))
@settings(max_examples=300)
def test_byte_pairs_round_trip_any_bytes(trained, content):
    ids = trained.encode(content)
    assert trained.decode(ids) == content
    assert not ids.size or 0 <= ids.min() <= ids.max() < trained.boundary


def test_byte_pairs_are_fewer_than_bytes_and_end_below_the_boundary(trained):
    assert len(trained.encode(PROSE)) < len(PROSE) / 2
    assert trained.vocab_size == 300
    assert trained.boundary == 299


def test_one_endless_line_is_no_special_case(trained):
    line = b"a" * 300_000
    assert trained.decode(trained.encode(line)) == line


@pytest.mark.parametrize("make", [ByteTokenizer, None])
def test_a_saved_tokenizer_is_the_same_one(tmp_path, trained, make):
    tokenizer = make() if make else trained
    tokenizer.save(tmp_path)
    again = load(tmp_path)
    assert (again.name, again.vocab_size, again.boundary) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.boundary,
    )
    np.testing.assert_array_equal(again.encode(PROSE), tokenizer.encode(PROSE))


def test_boundaries_vanish_and_ids_out_of_range_are_refused(trained):
    for tokenizer in (ByteTokenizer(), trained):
        ids = np.concatenate([[tokenizer.boundary], tokenizer.encode(b"ab"), [tokenizer.boundary]])
        assert tokenizer.decode(ids) == b"ab"
        for wrong in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError, match="must lie in"):
                tokenizer.decode(np.asarray([wrong]))


@pytest.mark.parametrize("spec", ["byte", "bpe:", "bpe:257", "bpe:-5", "bpe:4k", "bpe:²"])
def test_a_wrong_tokenizer_is_a_user_error(tmp_path, spec):
    with pytest.raises(UserError, match=r"bpe|bytes"):
        make_tokenizer(spec, text_set(tmp_path))


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'attnlab\[bpe\]'"):
        make_tokenizer("bpe:300", text_set(tmp_path))


def test_the_tokenizer_is_trained_on_train_only_and_once(tmp_path, monkeypatch):
    first = make_tokenizer("bpe:280", text_set(tmp_path / "a", test=b"zqzqzqzq" * 99))
    other = make_tokenizer("bpe:280", text_set(tmp_path / "b", test=b"never seen"))
    assert first.model == other.model
    monkeypatch.setattr(bpe, "train", None)
    again = make_tokenizer("bpe:280", text_set(tmp_path / "a"))
    assert again.model == first.model


def test_stored_tokens_are_those_of_the_documents(tmp_path):
    text = text_set(tmp_path)
    tokenizer = make_tokenizer("bpe:280", text)
    for split in text.splits:
        tokens = bpe.stored_tokens(text, split, tokenizer)
        expected = tokenizer.encode(text[split].document(0))
        np.testing.assert_array_equal(tokens.read(0, int(tokens.ends[-1])), expected)


def test_damaged_or_foreign_tokens_are_a_data_error(tmp_path, monkeypatch):
    text = text_set(tmp_path)
    tokenizer = make_tokenizer("bpe:280", text)
    bpe.stored_tokens(text, "test", tokenizer)
    path = next(tmp_path.glob("tokens-*-test")) / "ids.npy"
    ids = np.load(path)
    ids[0] = 279
    np.save(path, ids)
    monkeypatch.setattr(places, "_verified", {})
    with pytest.raises(DataError, match=r"ids\.npy is damaged"):
        bpe.stored_tokens(text, "test", tokenizer)
    (path.parent / "manifest.json").unlink()
    write_manifest(path.parent, {"about": {}})
    with pytest.raises(DataError, match="token id 279"):
        bpe.stored_tokens(text, "test", tokenizer)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", json.dumps({"name": 5}), "null"])
def test_an_unreadable_saved_tokenizer_is_a_data_error(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load(tmp_path)


def test_marks_say_where_words_sentences_and_paragraphs_end():
    marks = marks_of(ByteTokenizer())
    assert len(marks) == 257
    assert [marks[byte] for byte in b'a \t.!?\n\xe9"'] == [0, 1, 1, 2, 2, 2, 3, 0, 0]
    assert marks[256] == 3


def test_a_byte_pair_marks_what_it_begins_and_ends(trained):
    class Spelled(ByteTokenizer):
        spelled = (b" the", b"the", b". ", b'."', b" a.", b"\n\n", b"")
        vocab_size, boundary = 7, 6

        def decode(self, ids):
            return b"".join(self.spelled[number] for number in ids)

    assert list(marks_of(Spelled())) == [4, 0, 2, 2, 6, 3, 3]
    assert len(marks_of(trained)) == 300
