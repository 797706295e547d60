# SPDX-License-Identifier: Apache-2.0
"""Finds the components of a job that listen to FLARE's analytics events: FLARE's receivers, and the user's own.

If trackhub takes over what FLARE's writers log, listeners get no events. So the recipe warns of all listeners, and the
receiver's widget warns of listeners on the server. A client that has a listener keeps FLARE's events.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from nvflare.apis.analytix import ANALYTIC_EVENT_TYPE
from nvflare.apis.fl_component import FLComponent
from nvflare.app_common.widgets.streaming import AnalyticsReceiver

__all__ = ["client_warning", "is_of_a_product", "listeners", "server_warning"]


def listeners(components: Mapping[str, Any]) -> list[str]:
    """Return the components that listen to analytics events, as far as can be seen, each as ``id (class)``.

    FLARE's receivers listen. A component of the user's counts as a listener if its code or an attribute names the
    event.

    Args:
        components: the components of an app, by id.
    """
    return [f"{name} ({type(c).__name__})" for name, c in components.items() if _listens(c)]


def server_warning(found: list[str], take_over: object, *, has_server_side: bool) -> str:
    """Return a warning about listeners on the server. Empty if there is nothing to warn of.

    Args:
        found: what `listeners` returned.
        take_over: the job's value.
        has_server_side: True if trackhub also tracks on the server.
    """
    if not found or take_over in (False, "copy"):
        return ""
    way_out = (
        "With take_over='copy', they get everything as without trackhub, and trackhub records it too"
        if has_server_side
        else "Nothing is sent to the server, since tracking is on the client side only"
    )
    return (
        f"trackhub: {', '.join(found)} on the server will get nothing of what FLARE's own writers log at the clients, "
        f"since trackhub takes it over. {way_out}"
    )


def client_warning(found: list[str], take_over: object) -> str:
    """Return a warning about listeners at clients. Empty if there is nothing to warn of."""
    if not found or take_over is not True:
        return ""
    return (
        f"trackhub: {', '.join(found)} at the clients needs FLARE's analytics events. So trackhub takes what FLARE's "
        "own writers log from these events, as with take_over='events': it is slower, and an external trainer's last "
        "calls can be lost without a count"
    )


def is_of_a_product(module: str) -> bool:
    """Return whether a module is FLARE's or trackhub's. Of their classes, only FLARE's receivers are listeners.

    Others name the event as well, such as the one that sends a site's events to the server.
    """
    return module.split(".")[0] in ("nvflare", "trackhub")


def _listens(component: Any) -> bool:
    if isinstance(component, AnalyticsReceiver):
        return True
    cls = type(component)
    if not isinstance(component, FLComponent) or is_of_a_product(cls.__module__):
        return False
    if cls.handle_event is FLComponent.handle_event:
        return False
    values = list(vars(component).values())
    return any(_names_event(value) for value in values) or any(_code_names_event(f) for f in _functions(cls))


def _functions(cls: type) -> Iterator[FunctionType]:
    for base in cls.__mro__:
        if base.__module__.split(".")[0] != "nvflare":
            yield from (value for value in vars(base).values() if isinstance(value, FunctionType))


def _names_event(value: object) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return any(_names_event(item) for item in value)
    return isinstance(value, str) and value.endswith(ANALYTIC_EVENT_TYPE)


def _code_names_event(function: FunctionType) -> bool:
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        if any(_names_event(constant) for constant in code.co_consts):
            return True
        if any(_names_event(function.__globals__.get(name)) for name in code.co_names):
            return True
    return False
