"""Image classification of the Long Range Arena: what does an image show, pixel by pixel?"""

from dataclasses import dataclass

from attnlab.data.labelled import open_labelled
from attnlab.registry import register
from attnlab.tasks import Recipe
from attnlab.tasks.stored import VOCABULARY, Images


@register
@dataclass(frozen=True)
class Image(Recipe):
    """A row is a grey image, line by line, a token 0..255 for each pixel, and labelled once.
    ``source``: ``mnist`` (5,000 digits of 784 pixels), ``text:GLOB`` for files that hold pixels and
    nothing else, in a directory for each class, or ``tfds:NAME`` for a prepared set, whose colours
    become their luminance; the published task is ``tfds:cifar10``, 1,024 pixels.

    Splits as in `text_classification`. Raises `UserError` for another length than an image has,
    and what `attnlab.data.labelled.open_labelled` does. Source: Tay et al., arXiv 2011.04006.
    """

    source: str = "mnist"

    kind = "classes"
    vocab_size = VOCABULARY

    def build(self, *, seed: int, length: int, batch: int) -> Images:
        found = open_labelled(self.source)
        classes = len(found.classes)
        images = Images(self, classes, lambda: found, seed=seed, length=length, batch=batch)
        images.check_size("train", length)
        return images

    def check(self, length: int) -> None:
        """How long a row must be is known once there is an image."""
