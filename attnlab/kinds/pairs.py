"""Rows of two texts and one label: the share of labels that are right."""

from attnlab.kinds.classes import Classes
from attnlab.model import PairClassifier


class Pairs(Classes):
    form = PairClassifier


KIND = Pairs()
