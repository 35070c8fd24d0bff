"""Recall is measured where something was planted, and nowhere else."""

import json
import math
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny, trained

from attnlab.config import model_of
from attnlab.data.tokenizers import ByteTokenizer
from attnlab.errors import DataError, UserError
from attnlab.main import main
from attnlab.needle import (
    SIZE,
    choose_distances,
    measure_recall,
    plant_needles,
    score_needles,
)
from attnlab.step import init_params
from attnlab.tasks.text import Evaluated

BYTES = ByteTokenizer()
TEXT = BYTES.encode(b"In the beginning God created the heaven and the earth. " * 20)


class Pairs(NamedTuple):
    """A tokenizer of unequal tokens: "ab".."az" are one id each, all else is bytes."""

    boundary: int = 256

    def encode(self, text):
        ids, i = [], 0
        while i < len(text):
            pair = text[i : i + 2]
            merged = len(pair) == 2 and pair[0] < 110
            ids.append(257 + (pair[0] - 97) * 26 + pair[1] - 97 if merged else text[i])
            i += 1 + merged
        return np.array(ids, np.int32)

    def decode(self, ids):
        pairs = (divmod(int(i) - 257, 26) if i > 256 else (int(i) - 97,) for i in ids)
        return b"".join(bytes(97 + n for n in pair) for pair in pairs)


class Copier(NamedTuple):
    """A model that says what followed the last place where the newest three tokens stood."""

    size: int = 257

    def apply(self, variables, tokens, pos, seg):
        N = tokens.shape[1]
        past = jnp.stack(
            [jnp.pad(tokens, ((0, 0), (i, 0)), constant_values=-1)[:, :N] for i in range(3)], -1
        )
        same = jnp.all(past[:, :, None] == past[:, None], -1) & (pos[:, None] < pos[:, :, None])
        found = jnp.max(jnp.where(same, pos[:, None], -1), -1)
        follower = jnp.take_along_axis(tokens, jnp.minimum(found + 1, N - 1), 1)
        return 9.0 * jax.nn.one_hot(follower, self.size) * (found >= 0)[..., None], None


class Documents(NamedTuple):
    """A task that only has documents to plant in."""

    texts: list
    tokenizer: ByteTokenizer = BYTES

    def documents(self, split):
        for text in self.texts:
            yield Evaluated("", self.tokenizer.encode(text), len(text), 0)


@pytest.mark.parametrize("tokenizer", [BYTES, Pairs()])
@given(length=st.integers(40, 300), seed=st.integers(0, 9))
def test_the_string_stands_at_its_distance_and_at_the_end(tokenizer, length, seed):
    planted = plant_needles(TEXT, tokenizer, length, 3, seed)
    distances = [needles.distance for needles in planted]
    assert distances == [*sorted(distances[:-1]), 0]
    for needles in planted:
        assert needles.windows.shape == (3, length)
        assert (needles.windows[:, 0] == tokenizer.boundary).all()
        for row, asked, size in zip(*needles[:3]):
            assert len(tokenizer.decode(row[length - asked :])) == size
            end = row[length - 2 * asked :]
            first = row[length - 2 * asked - needles.distance :][: len(end)]
            assert (first == end).all()
            whole = tokenizer.decode(row[1:])[-SIZE:]
            assert whole.isalpha()
            assert tokenizer.decode(row[1:]).count(whole) == 1 + bool(needles.distance)


def test_distances_differ_in_the_place_of_the_string_alone():
    planted = plant_needles(TEXT, BYTES, 200, 4, 0)
    absent = planted[-1].windows
    for needles in planted[:-1]:
        assert (needles.windows != absent).sum(1).max() <= SIZE
        assert (needles.windows[:, -SIZE:] == absent[:, -SIZE:]).all()


def test_the_same_seed_plants_the_same_and_another_does_not():
    one, same, other = (plant_needles(TEXT, BYTES, 100, 4, seed)[0].windows for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any(1).all()


@pytest.mark.parametrize(("length", "expected"), [(33, [16]), (100, [16, 64, 83]), (2048, None)])
def test_distances_grow_to_the_whole_window(length, expected):
    found = choose_distances(length, SIZE)
    assert found == expected or found[-1] == length - 1 - SIZE
    assert found[:1] == [16]


def test_what_leaves_no_room_or_no_text_is_refused():
    with pytest.raises(UserError, match="needs at least 33"):
        choose_distances(32, SIZE)
    with pytest.raises(DataError, match="no text"):
        plant_needles(TEXT[:0], BYTES, 100, 2, 0)


def test_a_text_shorter_than_the_window_is_repeated():
    assert plant_needles(TEXT[:9], BYTES, 100, 2, 0)[0].windows.shape == (2, 100)


def test_who_copies_recalls_all_and_without_a_string_nothing():
    task = Documents([b"the quick brown fox jumps over it. " * 30])
    result = measure_recall(Copier(), {}, task, length=128, samples=5, batch=4)
    assert [row["distance"] for row in result["distances"]] == [16, 64, 111]
    assert all(row["accuracy"] == 1 for row in result["distances"])
    assert all(row["bits_per_byte"] < 0.1 for row in result["distances"])
    assert result["absent"]["accuracy"] < 0.1
    assert json.loads(json.dumps(result)) == result


def test_who_knows_nothing_pays_for_every_byte():
    planted = plant_needles(TEXT, Pairs(), 128, 3, 0)
    uniform = Copier(256 + 1 + 26 * 26)
    for needles in planted[-1:]:
        score = score_needles(uniform, {}, needles)
        per_byte = math.log2(uniform.size) * needles.asked.sum() / needles.size.sum()
        assert score["bits_per_byte"] == pytest.approx(per_byte, rel=0.1)


def test_scores_do_not_depend_on_the_batch():
    model = model_of(tiny(), 257)
    needles = plant_needles(TEXT, BYTES, 64, 5, 0)[0]
    params = init_params(model, 0)
    one, other = (score_needles(model, params, needles, batch) for batch in (2, 8))
    assert one == pytest.approx(other)


def test_a_run_is_measured_by_its_command(tmp_path, capsys):
    path = shutil.copytree(trained(), tmp_path / "run")
    assert main(["needle", f"--workdir={path}", "--length=48", "--samples=2"]) == 0
    assert "absent" in capsys.readouterr().out
    result = json.loads((path / "needle.json").read_text())
    assert (result["step"], result["length"], result["samples"]) == (12, 48, 2)
    for wrong in ("--length=32", "--length=0", "--samples=0", "--seed=-1"):
        assert main(["needle", f"--workdir={path}", wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
