"""sdlab: a small labelled image set -> a synthetic one that trains a classifier as well (ESANN 2024, see README)."""

from sdlab.errors import BadInput
from sdlab.runs.run import Run
from sdlab.settings import Settings

__all__ = ["BadInput", "Run", "Settings"]
