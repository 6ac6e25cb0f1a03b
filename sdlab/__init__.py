"""sdlab: a small labelled image set -> a synthetic one that trains a classifier as well (ESANN 2024, see README)."""

from sdlab.run import Run
from sdlab.settings import BadInput, Settings

__all__ = ["BadInput", "Run", "Settings"]
