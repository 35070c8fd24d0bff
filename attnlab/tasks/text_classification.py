"""Text classification of the Long Range Arena: which class does a text belong to, byte by byte?"""

from dataclasses import dataclass

from attnlab.data.labelled import open_labelled
from attnlab.registry import register
from attnlab.tasks import Recipe
from attnlab.tasks.stored import VOCABULARY, Stored


@register
@dataclass(frozen=True)
class TextClassification(Recipe):
    """A text is read as bytes, cut to the length of a row or padded, and labelled once. ``source``:
    ``bbc`` (topics of news), ``text:GLOB``, where the directory of a file is its class, or
    ``tfds:NAME`` for a prepared set; the published task is ``tfds:imdb_reviews`` at 4,000 bytes.

    A text is in one split by its SHA-256, unless the set has splits of its own; equal texts are
    kept once. Raises what `attnlab.data.labelled.open_labelled` does. Source: Tay et al., arXiv
    2011.04006.
    """

    source: str = "bbc"

    kind = "classes"
    vocab_size = VOCABULARY

    def build(self, *, seed: int, length: int, batch: int) -> Stored:
        found = open_labelled(self.source)
        classes = len(found.classes)
        return Stored(self, classes, lambda: found, seed=seed, length=length, batch=batch)

    def check(self, length: int) -> None:
        """Any length will do."""
