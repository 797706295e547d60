# SPDX-License-Identifier: Apache-2.0
"""Checks the types of what a plugin returned or raised. Nothing else checks at run time that a plugin keeps the SPI.

`RunDelivery` and `RetryTimer` pass every answer through here, so that a wrong answer harms only its own run.
"""

from __future__ import annotations

import msgspec

from trackhub.spi import Confirmation, Entry, Rejection, Results, WriteReport

__all__ = ["checked_confirmation", "checked_left_out", "checked_report", "checked_results", "checked_wait_s"]


def checked_report(answer: object) -> WriteReport | None:
    """Return what ``write`` returned.

    Raises:
        TypeError: it is neither None nor a `WriteReport` of `Rejection` objects.
    """
    if answer is None:
        return None
    if not isinstance(answer, WriteReport):
        raise TypeError(f"write() returned {type(answer).__name__}; expected None or a WriteReport")
    for one in answer.rejected:
        if not isinstance(one, Rejection) or type(one.position) is not int or type(one.reason) is not str:
            raise TypeError(f"write() reported {one!r}; expected a Rejection with a position and a reason")
    return answer


def checked_confirmation(answer: object) -> Confirmation:
    """Return what ``flush`` returned.

    Raises:
        TypeError: it is not a `Confirmation`.
    """
    if not isinstance(answer, Confirmation):
        raise TypeError(f"flush() returned {answer!r}; expected Confirmation.STORE or Confirmation.CLIENT")
    return answer


def checked_left_out(answer: object) -> dict[int, Entry]:
    """Return position -> entry, for the entries that ``left_out`` returned.

    Raises:
        TypeError: it is not a list or tuple of entries.
    """
    if not isinstance(answer, list | tuple) or not all(isinstance(one, Entry) for one in answer):
        raise TypeError(f"left_out() returned {type(answer).__name__}; expected a list of entries")
    return {entry.position: entry for entry in answer}


def checked_results(answer: object) -> Results | None:
    """Return what ``results`` returned.

    Raises:
        TypeError: it holds an object that is not a plain value.
        msgspec.ValidationError: it is neither None nor a `Results` of strings.
    """
    # Convert it to plain values and back. The journal stores it, and a field of a wrong type would make the journal
    # unreadable.
    return msgspec.convert(msgspec.to_builtins(answer), Results | None)


def checked_wait_s(answer: object) -> float | None:
    """Parse ``retry_after_s``, possibly a raw header. Return None if it is not numeric."""
    try:
        return max(0.0, float(answer))  # type: ignore[arg-type]  # other types raise TypeError
    except (TypeError, ValueError):
        return None
