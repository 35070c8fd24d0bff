"""Sets with class labels that TFDS has already prepared, texts and images, read as bytes.

Named as in `attnlab.data.catalogue`. An image is read row by row, its colours by their luminance.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from attnlab.data.catalogue import fingerprint_of, open_builder, text_feature
from attnlab.data.labelled import Labelled
from attnlab.data.textset import record_reader
from attnlab.errors import DataError, UserError

LUMINANCE = np.array([0.2989, 0.587, 0.114])  # of red, green and blue
ORDER = ("test", "validation", "train")  # of equal documents the first is kept


@dataclass(frozen=True)
class PreparedSet:
    """``spec`` is ``tfds:NAME[/CONFIG][:VERSION][#FEATURE]``. Its own splits are kept.

    Raises `DataError` when it is not prepared here or not in ArrayRecord, `UserError` when it is
    not clear which feature holds the class, or the content.
    """

    spec: str

    @property
    def name(self) -> str:
        return self.spec

    @property
    def licence(self) -> str:
        return self._opened[1].info.redistribution_info.license or "see the set's own page"

    @property
    def description(self) -> str:
        return " ".join((self._opened[1].info.description or "").split())[:200]

    def fingerprint(self) -> str:
        """Of the names, sizes and times of its files."""
        return fingerprint_of(self._opened[0], self.spec)

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """(class and number, content) of every record."""
        for number, (content, name, _) in enumerate(self.labelled()):
            yield f"{name}/{number}", content

    def labelled(self) -> Iterator[Labelled]:
        """Every record of its splits that are labelled."""
        import tensorflow_datasets as tfds

        builder, feature = self._opened[1], self.spec.partition("#")[2]
        features = dict(builder.info.features or {})
        labels = [n for n, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
        if len(labels) != 1:
            raise UserError(f"{self.spec} has {len(labels)} features with a class; it must be one")
        pixels = [n for n, f in features.items() if _is_image(f)]
        if feature in pixels or (not feature and len(pixels) == 1):
            feature = feature or pixels[0]
            make_reader = grey_reader
        else:
            feature = text_feature(builder.info.features, feature, self.spec.removeprefix("tfds:"))
            make_reader = record_reader
        names = features[labels[0]].names or range(features[labels[0]].num_classes)
        for split in ORDER:
            if split not in builder.info.splits:
                continue
            source = builder.as_data_source(split)
            read = make_reader(source, feature)
            for number in range(len(source)):
                try:
                    yield Labelled(read(number), str(names[int(source[number][labels[0]])]), split)
                except Exception as error:  # whatever the reader raises, the shard is at fault
                    raise DataError(
                        f"{self.spec}: record {number} of {split} cannot be read ({error}); "
                        "prepare it again"
                    ) from error

    @cached_property
    def _opened(self) -> tuple[Any, Any]:
        return open_builder(self.spec.removeprefix("tfds:").partition("#")[0])


def grey_reader(source: Any, feature: str) -> Any:
    """Reads one record of a data source as the bytes of its grey image."""
    return lambda number: grey(np.asarray(source[number][feature]))


def grey(image: np.ndarray) -> bytes:
    """The pixels of uint8 [height width], [height width 1], or [height width 3], line by line;
    of three colours the luminance, rounded."""
    if image.ndim == 3 and image.shape[2] == 3:
        image = np.rint(image @ LUMINANCE)
    return image.astype(np.uint8).tobytes()


def _is_image(feature: Any) -> bool:
    return getattr(feature, "np_dtype", None) == np.uint8 and len(feature.shape or ()) in (2, 3)
