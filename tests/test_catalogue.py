"""Sets that TFDS prepared elsewhere are read without TensorFlow."""

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from attnlab import tasks
from attnlab.data import catalogue
from attnlab.errors import DataError, UserError


class BookShelf(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What a set of the TFDS catalogue looks like: strings, several features, own splits."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES = ("book_text", "book_title")

    def __init__(self, home, splits, version="1.0.0"):
        self.books = splits
        type(self).VERSION = tfds.core.Version(version)
        super().__init__(data_dir=home, file_format="array_record")

    def _info(self):
        features = {name: tfds.features.Text() for name in self.FEATURES}
        features["book_id"] = tfds.features.Scalar(np.int32)
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(texts) for split, texts in self.books.items()}

    def _generate_examples(self, texts):
        for number, text in enumerate(texts):
            row = {name: f"{name} {number}" for name in self.FEATURES}
            yield number, row | {self.FEATURES[0]: text, "book_id": number + 100}


class TwoTexts(BookShelf, skip_registration=True):
    FEATURES = ("question", "answer")


BOOKS = [f"book {n} \r\n \0 é ".encode() * 10 for n in range(20)]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    tfds.disable_progress_bar()
    return tmp_path / "sets"


def prepare(make, *args, **options):
    make(*args, **options).download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def bodies(text, split):
    return [body for _, body in text[split]]


def test_the_splits_of_the_set_are_kept(home):
    prepare(BookShelf, home, {"train": BOOKS[:10], "validation": BOOKS[10:12], "test": BOOKS[12:]})
    text = catalogue.open_tfds("tfds:book_shelf")
    assert bodies(text, "train") == BOOKS[:10]
    assert bodies(text, "validation") == BOOKS[10:12]
    assert bodies(text, "test") == BOOKS[12:]
    assert text["train"].documents[0] == "100"
    assert text.about["notes"] == []
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("given", [(), ("test",), ("validation",)])
def test_missing_splits_come_off_the_end_of_train_and_it_is_said(home, given, capsys):
    prepare(BookShelf, home, {"train": BOOKS, **{split: BOOKS[:2] for split in given}})
    text = catalogue.open_tfds("tfds:book_shelf:1.0.0")
    said = capsys.readouterr().err
    rest = bodies(text, "train")
    for split in ("validation", "test"):
        if split in given:
            assert bodies(text, split) == BOOKS[:2]
        else:
            assert f"no {split} split" in said
            assert f"no {split} split" in " ".join(text.about["notes"])
            rest += bodies(text, split)
            assert len(bodies(text, split)) == 1
    assert rest == BOOKS


def test_the_highest_version_is_read_unless_one_is_named(home):
    prepare(BookShelf, home, {"train": BOOKS}, version="1.9.0")
    prepare(BookShelf, home, {"train": BOOKS[::-1]}, version="1.10.0")
    assert bodies(catalogue.open_tfds("tfds:book_shelf"), "train")[0] == BOOKS[-1]
    assert bodies(catalogue.open_tfds("tfds:book_shelf:1.9.0"), "train")[0] == BOOKS[0]
    directory = home / "book_shelf" / "1.9.0"
    assert bodies(catalogue.open_tfds(f"tfds:{directory}"), "train")[0] == BOOKS[0]


def test_the_records_are_scanned_once(home, monkeypatch):
    prepare(BookShelf, home, {"train": BOOKS})
    first = catalogue.open_tfds("tfds:book_shelf")
    monkeypatch.setattr(catalogue, "record_name", None)
    assert bodies(catalogue.open_tfds("tfds:book_shelf"), "train") == bodies(first, "train")


def test_empty_records_are_left_out_and_it_is_said(home, capsys):
    prepare(BookShelf, home, {"train": [b"", *BOOKS, b""]})
    text = catalogue.open_tfds("tfds:book_shelf")
    assert [b for s in ("train", "validation", "test") for b in bodies(text, s)] == BOOKS
    assert "left out 2 empty records" in capsys.readouterr().err


def test_an_unclear_text_feature_must_be_named(home):
    prepare(TwoTexts, home, {"train": BOOKS})
    with pytest.raises(
        UserError, match=r"tfds:two_texts#FEATURE with one of \['answer', 'question'\]"
    ):
        catalogue.open_tfds("tfds:two_texts")
    assert bodies(catalogue.open_tfds("tfds:two_texts#question"), "train")[0] == BOOKS[0]
    with pytest.raises(UserError, match="#FEATURE"):
        catalogue.open_tfds("tfds:two_texts#quest")


def test_a_set_that_is_not_here_says_how_to_prepare_it(home):
    with pytest.raises(DataError, match=r"tensorflow-cpu.*'pg19'.*array_record"):
        catalogue.open_tfds("tfds:pg19:0.1.1")


def test_too_few_documents_and_no_train_split_are_data_errors(home):
    prepare(BookShelf, home, {"train": BOOKS[:2]})
    with pytest.raises(DataError, match="too few"):
        catalogue.open_tfds("tfds:book_shelf")
    prepare(BookShelf, home, {"test": BOOKS}, version="2.0.0")
    with pytest.raises(DataError, match="no train split"):
        catalogue.open_tfds("tfds:book_shelf")


def test_a_damaged_shard_is_a_data_error(home):
    prepare(BookShelf, home, {"train": BOOKS})
    shard = next(home.rglob("*.array_record*"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match="prepare it again"):
        catalogue.open_tfds("tfds:book_shelf")


def test_a_prepared_set_trains(home):
    prepare(BookShelf, home, {"train": BOOKS})
    config = {"name": "text", "corpus": "tfds:book_shelf", "length": 8, "batch": 2}
    task = tasks.build(config)
    assert task.batch(0)["tokens"].shape == (2, 8)
