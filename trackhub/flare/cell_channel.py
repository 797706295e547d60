# SPDX-License-Identifier: Apache-2.0
"""Carries requests from the senders of clients to the receiver on the server, over FLARE's cells.

The sender's widget makes the client's end. The receiver's widget makes the server's end. Like `flare_internals`, this
module uses parts of FLARE that are not documented.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.defs import CellChannel as FlareChannel
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.cellnet.defs import ReturnCode as CellReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply as make_cell_reply
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.widgets.fed_event import FED_EVENT_TOPIC

from trackhub.flare.flare_internals import EVENT_SITE, participants, site_of

__all__ = ["CellChannel", "NoReceiverError", "answer_for_sender", "have_sender", "note_sites_of_events"]

CHANNEL = "trackhub"
"""FLARE's Cell routes a request by channel and topic. The topic is the receiver's component id."""

_SENDER_TOPIC = f"{CHANNEL}.sender"
_PAYLOAD = "trackhub"
_REFUSAL = "trackhub.refusal"


class NoReceiverError(Exception):
    """The server has no receiver, and will have none in this job."""


class CellChannel:
    """Carries requests from clients to the receiver on the server, from cell to cell.

    The name of the server's job cell differs between the simulator and a provisioned federation. So a client first asks
    for the name with an auxiliary message. Then the client sends its requests to the named cell, on a channel that only
    trackhub uses.
    """

    def __init__(self, engine: Any, component_id: str) -> None:
        """Make one end of the channel.

        Args:
            engine: FLARE's engine in this process.
            component_id: the id of the receiver's component on the server.
        """
        self._engine = engine
        self._topic = component_id
        self._hello_topic = f"{CHANNEL}.hello.{component_id}"
        self._target: str | None = None
        self._ever_reached = False
        self._ready = False
        self._refusal = ""

    def announce(self) -> None:
        """Server: answer clients that ask for the cell's name. Until ``serve`` is called, the answer is "not yet"."""
        self._engine.register_aux_message_handler(self._hello_topic, self._on_hello)

    def serve(self, handle: Callable[[str, bytes], bytes]) -> None:
        """Server: call ``handle`` for every request, with the site that the request really comes from."""
        clients = participants(self._engine)

        def on_request(message: Any) -> Any:
            origin = message.get_header(MessageHeaderKey.ORIGIN) or ""
            site = site_of(origin, clients)
            payload = message.payload
            if site is None:
                clients.update(participants(self._engine))
                site = site_of(origin, clients)
            if site is None:
                return make_cell_reply(CellReturnCode.UNAUTHENTICATED, f"{origin!r} is not a client of this job")
            if not isinstance(payload, dict) or not isinstance(payload.get(_PAYLOAD), bytes):
                return make_cell_reply(CellReturnCode.INVALID_REQUEST, "not a trackhub request")
            return make_cell_reply(CellReturnCode.OK, body={_PAYLOAD: handle(site, payload[_PAYLOAD])})

        # Pass `channel` by keyword. FLARE's Cell looks at this keyword. Without it, the callback would be registered
        # where no request arrives.
        self._engine.get_cell().register_request_cb(channel=CHANNEL, topic=self._topic, cb=on_request)
        self._ready = True

    def refuse(self, reason: str) -> None:
        """Server: tell clients that there will be no receiver, and why, so that they do not wait for one."""
        self._refusal = reason

    def _on_hello(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        if self._refusal:
            return make_reply(ReturnCode.ERROR, {_REFUSAL: self._refusal})
        if not self._ready:
            return make_reply(ReturnCode.SERVER_NOT_READY)
        reply = make_reply(ReturnCode.OK)
        reply[_PAYLOAD] = self._engine.get_cell().get_fqcn()
        return reply

    def request(self, request: bytes, timeout_s: float) -> bytes:
        """Client: send one request and return the reply. Blocks up to ``timeout_s``; the first time, up to twice that.

        Raises:
            NoReceiverError: the server has no receiver, and will have none.
            ConnectionError: no valid reply came. The request may have arrived or not.
        """
        target = self._target or self._ask(timeout_s)
        try:
            message = self._engine.get_cell().send_request(
                channel=CHANNEL,
                topic=self._topic,
                target=target,
                request=new_cell_message({}, {_PAYLOAD: request}),
                timeout=timeout_s,
                optional=True,
            )
        except Exception as e:
            raise ConnectionError(f"{target}: {type(e).__name__}: {e}") from e
        code = message.get_header(MessageHeaderKey.RETURN_CODE)
        if code != CellReturnCode.OK:
            if code != CellReturnCode.TIMEOUT:
                self._target = None
            raise ConnectionError(f"{target}: {code} {message.get_header(MessageHeaderKey.ERROR) or ''}".rstrip())
        reply = message.payload.get(_PAYLOAD) if isinstance(message.payload, dict) else None
        if not isinstance(reply, bytes):
            raise ConnectionError(f"{target}: the reply is not from trackhub")
        self._target = target
        self._ever_reached = True
        return reply

    def _ask(self, timeout_s: float) -> str:
        with self._engine.new_context() as fl_ctx:
            _hide_abort_signal(fl_ctx)
            replies = self._engine.send_aux_request(
                targets=[FQCN.ROOT_SERVER],
                topic=self._hello_topic,
                request=Shareable(),
                timeout=timeout_s,
                fl_ctx=fl_ctx,
                optional=True,
            )
        reply = (replies or {}).get(FQCN.ROOT_SERVER)
        if not isinstance(reply, Shareable):
            raise ConnectionError("the server does not answer")
        refusal = reply.get_header(_REFUSAL)
        if isinstance(refusal, str) and not self._ever_reached:
            raise NoReceiverError(refusal)
        target = reply.get(_PAYLOAD)
        if reply.get_return_code() != ReturnCode.OK or not isinstance(target, str):
            raise ConnectionError(f"the server answers {reply.get_return_code()}")
        return target


def answer_for_sender(engine: Any) -> None:
    """Client: answer the server's question whether this client has a `TrackhubSender`."""
    engine.register_aux_message_handler(_SENDER_TOPIC, lambda topic, request, fl_ctx: make_reply(ReturnCode.OK))


def have_sender(engine: Any, sites: list[str], timeout_s: float) -> dict[str, bool]:
    """Server: ask sites whether they have a `TrackhubSender`. Return site -> answer, for the sites that answered.

    While its job process is still starting, a client answers "no", and FLARE logs an error at the client.

    Args:
        engine: FLARE's engine on the server.
        sites: the names of the sites.
        timeout_s: the longest wait for the answers, in seconds.
    """
    with engine.new_context() as fl_ctx:
        _hide_abort_signal(fl_ctx)
        replies = engine.send_aux_request(
            targets=sites, topic=_SENDER_TOPIC, request=Shareable(), timeout=timeout_s, fl_ctx=fl_ctx, optional=True
        )
    answers = {site: _answer_in(reply) for site, reply in (replies or {}).items()}
    return {site: answer for site, answer in answers.items() if answer is not None}


def _answer_in(reply: Any) -> bool | None:
    """Return True or False if a site says whether it has a sender. Return None for any other reply.

    Never raises: otherwise one malformed reply would lose the answers of the other sites.
    """
    try:
        code = reply.get_return_code() if isinstance(reply, Shareable) else None
    except ValueError:  # its headers are not a dict
        return None
    return {ReturnCode.OK: True, ReturnCode.TOPIC_UNKNOWN: False}.get(code) if isinstance(code, str) else None


def note_sites_of_events(engine: Any) -> None:
    """Server: note in each client's event the site that it really comes from, before FLARE handles it.

    FLARE itself takes the site's name from a header that the sender writes. A site can write any name there.
    """
    # ``engine.get_cell()`` would be another cell in the simulator.
    agent = engine.server.command_agent

    def on_event(message: Any) -> Any:
        if isinstance(message.payload, Shareable):
            site = site_of(message.get_header(MessageHeaderKey.ORIGIN) or "", participants(engine))
            message.payload.set_header(EVENT_SITE, site or "")
        return agent.aux_communicate(message)

    # A callback for one topic takes precedence over the agent's own callback for all topics.
    agent.cell.register_request_cb(channel=FlareChannel.AUX_COMMUNICATION, topic=FED_EVENT_TOPIC, cb=on_event)


def _hide_abort_signal(fl_ctx: FLContext) -> None:
    # FLARE does not wait for replies once the run's abort signal has triggered. That happens at every normal end of a
    # client. So hide the signal. Use put, since set_prop refuses to hide a sticky property.
    fl_ctx.put(key=ReservedKey.RUN_ABORT_SIGNAL, value=Signal(), private=True, sticky=False)
