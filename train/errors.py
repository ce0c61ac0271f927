"""What goes wrong in training in a way that the user can cure."""

from __future__ import annotations


class TrainError(Exception):
    """The message names the value, the limit and the cure."""


class DataError(TrainError):
    """The data cannot be read, or is not of the shape that the objective needs."""
