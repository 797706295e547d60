# SPDX-License-Identifier: Apache-2.0
"""Bounds how much of a foreign object a log call reads: it may be a whole data set, or have no end.

The modules that read arguments of log calls use it wherever they iterate over something that training code passed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TypeVar

from trackhub.errors import RecordError
from trackhub.records import MAX_VALUES_OF_RECORD

__all__ = ["Budget"]

_Item = TypeVar("_Item")


class Budget:
    """How many values may still be read for one record, or for one call.

    One budget serves all parts of an object. So it also bounds an object that is shared, or that contains itself.
    """

    def __init__(self, what: str, most: int = MAX_VALUES_OF_RECORD, unit: str = "values") -> None:
        """Begin with nothing read.

        Args:
            what: what is read, for the message.
            most: how many values may be read.
            unit: what the values are, for the message.
        """
        self._left = most
        self._about = what, most, unit  # no message yet: most budgets are kept

    def each(self, values: Iterable[_Item]) -> Iterable[_Item]:
        """Return the values. If there are more of them than may be read and they have a length, none is read.

        Raises:
            RecordError: there are more of them than may still be read.
        """
        if type(values) is dict and len(values) <= self._left:  # saves `Writer.log` of nested metrics the generator
            self._left -= len(values)
            return values
        return self._each(values)

    def _each(self, values: Iterable[_Item]) -> Iterator[_Item]:
        if isinstance(values, Sized) and len(values) > self._left:
            raise self._error()
        if isinstance(values, Sequence):  # its `__getitem__` may never raise IndexError
            values = itertools.islice(values, len(values))
        for value in values:
            self._left -= 1
            if self._left < 0:
                raise self._error()
            yield value

    def _error(self) -> RecordError:
        what, most, unit = self._about
        return RecordError(f"{what}: more than {most:,} {unit}; expected fewer; log a file of them with log_artifact")
