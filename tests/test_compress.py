"""The compressor baselines are what the command-line tools would give."""

import bz2
import gzip
import lzma
import random

import pytest

from attnlab.data.compress import baselines
from attnlab.data.textset import Index, TextSet, TextSplit
from attnlab.errors import DataError


def text_set(cache, train, test):
    def split(content):
        return TextSplit(Index(("d",), (1,), (len(content),)), lambda _: content)

    return TextSet({"train": split(train), "test": split(test)}, {}, cache)


def noise(size, seed):
    return random.Random(seed).randbytes(size)


def test_alone_is_the_size_of_the_compressed_file(tmp_path):
    held = b"to be or not to be, " * 50
    found = baselines(text_set(tmp_path, b"x", held))
    assert found["gzip -9"]["alone"] == 8 * len(gzip.compress(held, 9)) / len(held)
    assert found["bzip2 -9"]["alone"] == 8 * len(bz2.compress(held)) / len(held)
    xz = 8 * len(lzma.compress(held, preset=9 | lzma.PRESET_EXTREME)) / len(held)
    assert found["xz -9e"]["alone"] == pytest.approx(xz)


def test_after_train_sees_as_far_back_as_the_compressor_can(tmp_path):
    held = noise(40_000, 0)
    far = held + noise(1_200_000, 1)
    found = baselines(text_set(tmp_path, far, held))
    assert found["gzip -9"]["after_train"] > 7.9
    assert found["bzip2 -9"]["after_train"] > 7.9
    assert found["xz -9e"]["after_train"] < 0.5
    assert found["xz -9e"]["alone"] > 7.9


def test_the_numbers_are_kept_and_a_broken_file_is_computed_again(tmp_path, capsys):
    text = text_set(tmp_path, b"abc" * 100, b"abd" * 100)
    first = baselines(text)
    assert baselines(text) == first
    assert capsys.readouterr().err.count("compressing") == 1
    (tmp_path / "compress-test.json").write_text("{")
    assert baselines(text) == first


def test_an_empty_split_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="empty"):
        baselines(text_set(tmp_path, b"abc", b""))
