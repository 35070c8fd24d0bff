"""The TFDS builder of every text corpus: ArrayRecord shards, written and read without TensorFlow.

Importing this module imports `tensorflow_datasets` (seconds): import it inside functions only.

A record is a piece of at most `PIECE` bytes, so that reading a row out of the middle of a long
book costs the same as out of a short one, and a file of any size fits in a record. The pieces of a
document are neighbours; joined, they are the document.
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from attnlab.data.readers import Document

PIECE = 1 << 18

Generate = Callable[[], Iterable[Document]]


class LocalInfo(tfds.core.DatasetInfo):
    """Dataset information that is never looked up in the public bucket."""

    def initialize_from_bucket(self) -> None:
        """Nothing to ask: the set is made here."""


class AttnlabText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Features: ``text`` uint8 bytes of the piece, ``doc_id`` its document. Order is kept."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, splits: Mapping[str, Generate], data_dir: Path):
        self.generators = splits
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Tensor(
            shape=(None,), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        )
        return LocalInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"text": text, "doc_id": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict:  # pyright: ignore
        # A second parameter `pipeline`, as in the base class, would make TFDS ask for Apache Beam.
        del dl_manager
        return {name: self._generate_examples(make) for name, make in self.generators.items()}

    def _generate_examples(self, generate: Generate) -> Iterator[tuple[int, dict]]:
        key = 0
        for doc_id, content in generate():
            name = doc_id.encode("utf-8", "surrogateescape")
            for piece in pieces(content):
                yield key, {"text": np.frombuffer(piece, np.uint8), "doc_id": name}
                key += 1


def pieces(content: bytes) -> Iterator[bytes]:
    """A document in parts of `PIECE` bytes."""
    for start in range(0, len(content), PIECE):
        yield content[start : start + PIECE]


def write(splits: Mapping[str, Generate], directory: Path) -> Path:
    """Write the splits under `directory`; the directory that TFDS reads them from.

    Raises `OSError` when the disk does not take them.
    """
    tfds.disable_progress_bar()
    builder = AttnlabText(splits, directory)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    # What TFDS prints speaks of downloads and of a temporary directory.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            builder.download_and_prepare(download_config=config)
        except RuntimeError as error:  # how ArrayRecord reports what the system refused
            raise OSError(str(error).split("; ")[0]) from error
    return Path(builder.data_dir)
