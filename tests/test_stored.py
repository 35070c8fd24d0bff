"""Rows that are stored are gone through epoch by epoch, and no split shows what another holds."""

import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from tiny import labelled, pictures, tiny_on

from attnlab import tasks
from attnlab.data import places
from attnlab.data.labelled import open_labelled
from attnlab.errors import DataError, UserError
from attnlab.main import main
from attnlab.tasks.pathfinder import Pathfinder
from attnlab.tasks.retrieval import partner
from attnlab.tasks.stored import PAD, pool
from attnlab.tasks.stored.pool import draw_pool, pool_directory

SPLITS = ("train", "validation", "test")


def built(name, *changes, seed=0):
    source = pictures() if name == "image" else labelled()
    changes = (f"task.source={source}", *changes)
    return tasks.build(tiny_on(name, *changes).task, seed=seed)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty data directory, and parts of few rows."""
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path))
    monkeypatch.setattr(places, "_verified", {})
    monkeypatch.setattr(pool, "PART", 40)
    return tmp_path


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("name", ["text_classification", "retrieval", "image"])
def test_a_row_of_a_batch_depends_on_seed_step_and_its_number_alone(name):
    task = built(name, "task.length=64", seed=3)
    batch = task.batch(5)
    assert same(batch, built(name, "task.length=64", seed=3).batch(5))
    assert same({n: z[2:4] for n, z in batch.items()}, task.batch(5, slice(2, 4)))
    assert not same(batch, task.batch(6))
    assert not same(batch, built(name, "task.length=64", seed=4).batch(5))
    assert {z.dtype for z in batch.values()} == {np.dtype(np.int32)}


def test_an_epoch_reads_every_text_once_each_time_in_another_order():
    task = built("text_classification", "task.length=64", "task.batch=5")
    size = task.size("train")
    drawn = [task.batch(step) for step in range(-(-2 * size // 5))]
    rows = [row.tobytes() for batch in drawn for row in batch["tokens"]]
    assert len(set(rows[:size])) == size
    assert sorted(rows[:size]) == sorted(rows[size : 2 * size])
    assert rows[:size] != rows[size : 2 * size]


@pytest.mark.parametrize("name", ["text_classification", "retrieval", "image"])
def test_held_out_rows_are_the_same_for_every_seed_and_asked_for_in_batches(name):
    tokens = []
    for seed, split in itertools.product((0, 1), ("validation", "test")):
        task = built(name, "task.length=64", seed=seed)
        size = task.size(split)
        whole = task.draw(split, 0, range(size), 64)
        parts = [task.draw(split, step, range(4), 64) for step in range(-(-size // 4))]
        joined = {n: np.concatenate([p[n] for p in parts])[:size] for n in whole}
        assert same(whole, joined)
        tokens.append(whole)
    assert same(tokens[0], tokens[2])
    assert same(tokens[1], tokens[3])


def test_texts_are_cut_and_padded_and_keep_their_class():
    found = open_labelled(labelled())
    for length in (10, 64):
        task = built("text_classification", f"task.length={length}")
        for split in ("validation", "test"):
            examples = found.splits[split]
            drawn = task.draw(split, 0, range(len(examples)), length)
            assert (drawn["targets"] == examples.labels).all()
            assert (drawn["pos"] == np.arange(length)).all()
            for i, (row, seg) in enumerate(zip(drawn["tokens"], drawn["seg"])):
                text = examples[i][:length]
                assert (row[: len(text)] == text).all()
                assert (row[len(text) :] == PAD).all()
                assert (seg == np.where(np.arange(length) < len(text), 0, -1)).all()


def test_splits_share_no_text():
    task = built("text_classification", "task.length=64")
    sets = [
        {row.tobytes() for row in task.draw(s, 0, range(task.size(s)), 64)["tokens"]}
        for s in SPLITS
    ]
    assert all(sets)
    assert not any(a & b for a, b in itertools.combinations(sets, 2))


def test_an_unknown_split_is_one_line():
    with pytest.raises(UserError, match="did you mean 'train'"):
        built("text_classification").draw("trian", 0, range(2), 32)


def test_pairs_are_of_one_class_or_not_and_stand_in_halves():
    found, half = open_labelled(labelled()), 33
    texts = {  # as they stand in a row -> split and class
        examples[i][:half].tobytes(): (split, int(examples.labels[i]))
        for split, examples in found.splits.items()
        for i in range(len(examples))
    }
    task = built("retrieval", "task.length=67", "task.batch=64")
    for split in SPLITS:
        drawn = task.draw(split, 0, range(64), 67)
        assert drawn["targets"].sum() == 32
        for tokens, pos, seg, target in zip(
            *(drawn[n] for n in ("tokens", "pos", "seg", "targets"))
        ):
            sides = []
            for side in (0, 1):
                here = seg == side
                assert here[side * half : side * half + here.sum()].all()
                assert (pos[here] == np.arange(here.sum())).all()
                sides.append(texts[tokens[here].astype(np.uint8).tobytes()])
            assert (tokens[seg < 0] == PAD).all()
            assert {name for name, _ in sides} == {split}
            assert (sides[0][1] == sides[1][1]) == bool(target)
            assert not np.array_equal(tokens[:half], tokens[half : 2 * half])


def test_every_text_begins_one_pair_an_epoch_and_meets_another_each_time():
    task = built("retrieval", "task.length=128", "task.batch=1")
    size = task.size("train")
    rows = [task.batch(step)["tokens"][0] for step in range(2 * size)]
    first = [row[:64].tobytes() for row in rows]
    assert len(set(first[:size])) == size
    assert sorted(first[:size]) == sorted(first[size:])
    seconds = {}
    for row, text in zip(rows, first):
        seconds.setdefault(text, set()).add(row[64:].tobytes())
    assert np.mean([len(each) for each in seconds.values()]) > 1.5


def test_partners_are_uniform_and_never_the_text_itself():
    labels = np.array([0, 1, 0, 1, 0])
    rng = np.random.default_rng(0)
    together = np.bincount([partner(labels, 2, True, rng) for _ in range(4000)], minlength=5)
    apart = np.bincount([partner(labels, 2, False, rng) for _ in range(4000)], minlength=5)
    assert together / 4000 == pytest.approx([0.5, 0, 0, 0, 0.5], abs=0.04)
    assert apart / 4000 == pytest.approx([0, 0.5, 0, 0.5, 0], abs=0.04)


def test_texts_without_a_partner_are_a_data_error(tmp_path, store):
    for name, count in (("a", 30), ("b", 30), ("rare", 1)):
        (tmp_path / "texts" / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "texts" / name / str(number)).write_text(f"{name} {number}")
    source = f"text:{tmp_path}/texts/*/*"
    with pytest.raises(DataError, match="1 rare; pairs need two classes"):
        tasks.build(tiny_on("retrieval", f"task.source={source}").task)


@pytest.mark.parametrize("length", [16, 63, 65])
def test_a_row_is_one_image(length):
    with pytest.raises(UserError, match=r"set task\.length=64"):
        built("image", f"task.length={length}").batch(0)


def test_a_row_of_one_token_holds_no_pair():
    with pytest.raises(UserError, match="a half for each text"):
        built("retrieval", "task.length=1")


def test_a_pool_is_drawn_once_and_split_by_content(store, monkeypatch, capsys):
    task = tasks.build(tiny_on("pathfinder", "task.length=1024", "task.pool=70").task, seed=0)
    assert task.classes == 2
    assert not list(store.iterdir()), "nothing is drawn before it is read"
    batch = task.batch(0)
    assert task.size("train") == 70
    assert capsys.readouterr().err.count("drawing 70 rows once") == 1
    sets = [
        {row.tobytes() for row in task.draw(s, 0, range(task.size(s)), 1024)["tokens"]}
        for s in SPLITS
    ]
    assert len(sets[0]) == 70
    assert not any(a & b for a, b in itertools.combinations(sets, 2))
    monkeypatch.setattr(Pathfinder, "rows", None)
    again = tasks.build(tiny_on("pathfinder", "task.length=1024", "task.pool=70").task, seed=0)
    assert same(again.batch(0), batch)
    assert not capsys.readouterr().err


def test_images_of_a_pool_are_those_that_were_drawn(store):
    recipe = Pathfinder(pool=20)
    kept = draw_pool(recipe, 1024).splits
    drawn = recipe.rows(np.random.default_rng([1024, 0]), 40, 1024)
    labels = {
        row.astype(np.uint8).tobytes(): y for row, y in zip(drawn["tokens"], drawn["targets"])
    }
    for examples in kept.values():
        for i in range(len(examples)):
            assert labels[examples[i].tobytes()] == examples.labels[i]


def test_a_larger_pool_goes_on_where_a_smaller_one_ended(store, capsys):
    small = draw_pool(Pathfinder(pool=30), 1024).splits
    parts = sorted(pool_directory(Pathfinder(), 1024).iterdir())
    stamps = [(part / "manifest.json").stat().st_mtime_ns for part in parts]
    large = draw_pool(Pathfinder(pool=60), 1024).splits
    assert [(part / "manifest.json").stat().st_mtime_ns for part in parts] == stamps
    for split in SPLITS:
        assert len(large[split]) >= len(small[split])
        assert all((large[split][i] == small[split][i]).all() for i in range(len(small[split])))
    other = draw_pool(Pathfinder("easy", 30), 1024).splits["train"]
    assert not (other[0] == small["train"][0]).all()


CHILD = """
import os, signal, sys
from attnlab.data import places
from attnlab.tasks.pathfinder import Pathfinder
from attnlab.tasks.stored import pool
pool.PART = 40
at, write = sys.argv[1], places.write_manifest
def killed(directory, body):
    if at == "second" and directory.parent.joinpath("00000").is_dir():
        os.kill(os.getpid(), signal.SIGKILL)
    write(directory, body)
places.write_manifest = killed
pool.draw_pool(Pathfinder(pool=60), 1024)
"""


def child(at):
    return subprocess.Popen([sys.executable, "-c", CHILD, at])


def test_kill_9_while_drawing_keeps_the_parts_that_are_whole(store):
    assert child("second").wait() == -signal.SIGKILL
    home = pool_directory(Pathfinder(), 1024)
    assert (home / "00000" / "manifest.json").is_file()
    assert not (home / "00001").exists()
    found = draw_pool(Pathfinder(pool=60), 1024).splits
    assert len(found["train"]) == 60
    assert not list(home.glob(".building-*"))


def test_two_processes_drawing_at_once_both_succeed(store):
    running = [child("never") for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert len(draw_pool(Pathfinder(pool=60), 1024).splits["train"]) == 60


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_part_names_the_file_and_the_fix(store, monkeypatch, damage):
    draw_pool(Pathfinder(pool=20), 1024)
    monkeypatch.setattr(places, "_verified", {})
    path = pool_directory(Pathfinder(), 1024) / "00000" / "train-content.npy"
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(bytes(content))
    elif damage == "truncate":
        os.truncate(path, 100)
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"train-content\.npy .*remove the directory") as caught:
        draw_pool(Pathfinder(pool=20), 1024)
    assert caught.value.code == 3
    assert "\n" not in str(caught.value)


def test_a_damaged_pool_ends_a_command_with_code_3(store, monkeypatch, tmp_path, capsys):
    draw_pool(Pathfinder(pool=20), 1024)
    monkeypatch.setattr(places, "_verified", {})
    next(pool_directory(Pathfinder(), 1024).rglob("*labels.npy")).write_bytes(b"")
    sizes = "width=8 --config.model.layers=1 --config.task.pool=20 --config.task.batch=8"
    line = f"train --config=configs/lra.py:task=pathfinder --workdir={tmp_path}/run --config.model."
    assert main((line + sizes).split()) == 3
    assert "remove the directory" in capsys.readouterr().err
