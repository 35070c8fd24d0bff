"""A corpus is prepared whole or not at all, and damage is noticed."""

import hashlib
import os
import signal
import subprocess
import sys

import pytest

from attnlab.data import builder, places, prepared
from attnlab.data.corpora import Files
from attnlab.data.prepared import open_corpus
from attnlab.errors import DataError

NASTY = {
    "bom.txt": b"\xef\xbb\xbfhello",
    "crlf.txt": b"one\r\ntwo\r\n",
    "latin.txt": b"caf\xe9 \xff\xfe",
    "nul.txt": b"\0\0a\0",
    "one.txt": b"x",
    "long.txt": bytes(range(256)) * 3000,
}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Small files of the unpleasant kind, and an empty data directory."""
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(places, "_verified", {})
    (tmp_path / "files").mkdir()
    for name, content in NASTY.items():
        (tmp_path / "files" / name).write_bytes(content)
    return Files(f"{tmp_path}/files/*")


def contents(text):
    """File name -> bytes over all splits."""
    found = [(name.rsplit("/")[-1], body) for split in text.splits.values() for name, body in split]
    assert len(found) == len(dict(found))
    return dict(found)


def shards(tmp_path):
    return sorted((tmp_path / "data").rglob("*.array_record*"))


def leftovers(tmp_path):
    return list((tmp_path / "data").rglob(".building-*"))


def test_bytes_come_back_exactly_and_long_documents_are_cut_into_records(corpus):
    text = open_corpus(corpus)
    assert contents(text) == NASTY
    long = next(split for split in text.splits.values() if "long" in " ".join(split.documents))
    assert max(record.size for record in long.records()) == builder.PIECE
    assert all(split.size > 0 for split in text.splits.values())


def test_a_second_opening_prepares_nothing(corpus, monkeypatch):
    first = open_corpus(corpus)
    monkeypatch.setattr(prepared, "prepare", None)
    assert contents(open_corpus(corpus)) == contents(first)


def test_changed_files_are_prepared_anew(corpus, tmp_path):
    open_corpus(corpus)
    (tmp_path / "files" / "one.txt").write_bytes(b"y")
    assert contents(open_corpus(corpus))["one.txt"] == b"y"


def test_the_checksum_is_that_of_all_bytes_in_order(corpus):
    joined = b"".join(NASTY[name] for name in sorted(NASTY))
    assert open_corpus(corpus).about["sha256"] == hashlib.sha256(joined).hexdigest()


def test_a_flipped_byte_names_the_file_and_the_fix(corpus, tmp_path, monkeypatch):
    open_corpus(corpus)
    monkeypatch.setattr(places, "_verified", {})
    shard = shards(tmp_path)[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(DataError, match=rf"{shard.name} is damaged.*remove the directory"):
        open_corpus(corpus)


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_other_damage_is_a_data_error_too(corpus, tmp_path, monkeypatch, damage):
    open_corpus(corpus)
    monkeypatch.setattr(places, "_verified", {})
    shard = shards(tmp_path)[0]
    if damage == "truncate":
        os.truncate(shard, 10)
    elif damage == "remove":
        shard.unlink()
    else:
        next((tmp_path / "data").rglob("manifest.json")).write_text("{")
    with pytest.raises(DataError, match="remove the directory"):
        open_corpus(corpus)


CHILD = """
import os, signal, sys
from attnlab.data import prepared
from attnlab.data.corpora import Files
at = sys.argv[2]
original = prepared.Recorded.__call__
def killed(self):
    for number, document in enumerate(original(self)):
        yield document
        if at == "middle" and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
if at == "middle":
    prepared.Recorded.__call__ = killed
if at == "end":
    prepared.publish.__globals__["write_manifest"] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
prepared.open_corpus(Files(sys.argv[1]))
"""


def child(corpus, at):
    return subprocess.Popen([sys.executable, "-c", CHILD, corpus.pattern, at])


@pytest.mark.parametrize("at", ["middle", "end"])
def test_kill_9_while_preparing_leaves_nothing_in_the_way(corpus, tmp_path, at):
    assert child(corpus, at).wait() == -signal.SIGKILL
    assert leftovers(tmp_path)
    assert contents(open_corpus(corpus)) == NASTY
    assert not leftovers(tmp_path)


def test_two_processes_preparing_at_once_both_succeed(corpus, tmp_path):
    running = [child(corpus, "never") for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert contents(open_corpus(corpus)) == NASTY
    assert not leftovers(tmp_path)


def test_the_loser_of_a_race_keeps_the_winners_directory(tmp_path):
    def fill_late(directory):
        places.publish(tmp_path / "made", lambda d: {"by": "winner"})
        return {"by": "loser"}

    places.publish(tmp_path / "made", fill_late)
    assert places.verify(tmp_path / "made") == {"by": "winner"}
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_files_are_split_by_bytes_and_it_is_said(tmp_path, monkeypatch, capsys, count):
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path / "data"))
    (tmp_path / "files").mkdir()
    for number in range(count):
        (tmp_path / "files" / f"{number}").write_bytes(bytes(range(100)))
    text = open_corpus(Files(f"{tmp_path}/files/*"))
    assert "split by bytes" in capsys.readouterr().err
    assert [split.size for split in text.splits.values()] == [90 * count, 5 * count, 5 * count]
    joined = b"".join(dict(split)[split.documents[0]] for split in text.splits.values())
    assert joined == bytes(range(100))


def test_documents_whose_names_say_their_split_are_in_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path / "data"))
    for split in ("train", "valid", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "set" / split / f"{number}.txt").write_text(f"{split} {number}")
    text = open_corpus(Files(f"{tmp_path}/set/**/*.txt"))
    assert "every document is in the split that its name says" in capsys.readouterr().err
    bodies = {name: [body for _, body in split] for name, split in text.splits.items()}
    assert bodies == {
        "train": [b"train 0", b"train 1"],
        "validation": [b"valid 0", b"valid 1"],
        "test": [b"test 0", b"test 1"],
    }


def test_empty_files_are_reported_and_left_out(corpus, tmp_path, capsys):
    (tmp_path / "files" / "empty.txt").write_bytes(b"")
    assert contents(open_corpus(corpus)) == NASTY
    assert "1 empty documents" in capsys.readouterr().err


def test_nothing_but_empty_files_is_a_data_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path / "data"))
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        open_corpus(Files(f"{tmp_path}/empty"))
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("content", [b"much longer than before", b"y", None])
def test_files_that_change_while_being_prepared_are_noticed(corpus, tmp_path, monkeypatch, content):
    measure = prepared.measure

    def measure_then_change(source):
        found = measure(source)
        for name in ("one.txt", "nul.txt"):
            (tmp_path / "files" / name).unlink()
            if content is not None:
                (tmp_path / "files" / name).write_bytes(content)
        return found

    monkeypatch.setattr(prepared, "measure", measure_then_change)
    with pytest.raises(DataError, match="changed while"):
        open_corpus(corpus)
    assert not leftovers(tmp_path)


def test_a_split_that_vanishes_while_being_prepared_is_noticed(corpus, tmp_path, monkeypatch):
    measure = prepared.measure

    def measure_then_remove(source):
        found = measure(source)
        for path in (tmp_path / "files").iterdir():
            if path.name != "long.txt":
                path.unlink()
        return found

    monkeypatch.setattr(prepared, "measure", measure_then_remove)
    with pytest.raises(DataError, match="changed while"):
        open_corpus(corpus)


def test_the_split_does_not_depend_on_where_the_files_lie(corpus, tmp_path):
    here = open_corpus(corpus)
    (tmp_path / "files").rename(tmp_path / "moved")
    there = open_corpus(Files(f"{tmp_path}/moved/*.txt"))
    for split in here.splits:
        assert here[split].documents == there[split].documents


def test_a_build_that_still_runs_is_not_swept_away(tmp_path):
    with places.building(tmp_path) as first, places.building(tmp_path) as second:
        assert first.is_dir()
        assert second.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_writer_that_loses_bytes_is_caught_by_reading_back(corpus, monkeypatch):
    pieces = builder.pieces

    def lossy(content):
        return (piece.replace(b"o", b"0") for piece in pieces(content))

    write = builder.write

    def write_lossy(splits, directory):
        monkeypatch.setattr(builder, "pieces", lossy)
        return write(splits, directory)

    monkeypatch.setattr(builder, "write", write_lossy)
    with pytest.raises(DataError, match="does not read back"):
        open_corpus(corpus)


def test_a_writer_that_finds_the_disk_full_names_the_place(corpus, tmp_path, monkeypatch):
    def full(self, **options):
        raise RuntimeError("Failed to finalize; write() failed: No space left on device; at 9")

    monkeypatch.setattr(builder.AttnlabText, "download_and_prepare", full)
    with pytest.raises(DataError, match=r"cannot write under .*Failed to finalize.*ATTNLAB_DATA"):
        open_corpus(corpus)


def test_a_full_disk_names_the_place(corpus, tmp_path, monkeypatch):
    def full(splits, directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builder, "write", full)
    with pytest.raises(DataError, match=r"No space left on device.*ATTNLAB_DATA"):
        open_corpus(corpus)
    assert not leftovers(tmp_path)
