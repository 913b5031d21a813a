"""The states of a connection to an upstream and the allowed transitions between them. Pure.

    connecting ──▶ idle ──▶ awaiting head ──▶ receiving ─────────────┬──▶ complete ──▶ complete, closed
        │          │ ▲           │   │  └───▶ receiving until close ─┘        │
        │          │ │           │   │                                        │
        │          │ └───────────┼───┼────────────────────────────────────────┘  reused for the next request
        ▼          ▼             ▼   └─ the response to a HEAD request is complete with its head
     closed ◀──────┴─────────────┴─────── also from both receiving states

`Connection` changes its state in one method, which checks this table. A connection that closes after a whole response
differs from one that closes before: the bytes received of the first are still read completely.

Rejected: flags for "busy", "head received", "complete" and "closed". Most of their combinations cannot occur, and each
use had to exclude those.
"""

from collections.abc import Mapping
from enum import Enum


class ConnectionState(Enum):
    """What a connection is doing. `following` are the states that the table allows next."""

    following: "frozenset[ConnectionState]"
    __hash__ = object.__hash__  # members hash in C, unlike those of other enums: every request makes four transitions

    CONNECTING = 0
    """No transport yet."""
    IDLE = 1
    """Connected, without a request."""
    AWAITING_HEAD = 2
    """A request has begun; the final response's status and headers have not arrived."""
    RECEIVING = 3
    """The body is arriving; its framing says where it ends."""
    RECEIVING_UNTIL_CLOSE = 4
    """The body is arriving; it ends where the upstream closes the connection."""
    COMPLETE = 5
    """The whole response has arrived; the connection is open."""
    COMPLETE_CLOSED = 6
    """The whole response has arrived; the connection is closed."""
    CLOSED = 7
    """Closed without a request, or before the whole response arrived."""


_S = ConnectionState
TRANSITIONS: Mapping[ConnectionState, frozenset[ConnectionState]] = {
    _S.CONNECTING: frozenset({_S.IDLE, _S.CLOSED}),
    _S.IDLE: frozenset({_S.AWAITING_HEAD, _S.CLOSED}),
    _S.AWAITING_HEAD: frozenset({_S.RECEIVING, _S.RECEIVING_UNTIL_CLOSE, _S.COMPLETE, _S.CLOSED}),
    _S.RECEIVING: frozenset({_S.COMPLETE, _S.CLOSED}),
    _S.RECEIVING_UNTIL_CLOSE: frozenset({_S.COMPLETE, _S.CLOSED}),
    _S.COMPLETE: frozenset({_S.IDLE, _S.COMPLETE_CLOSED}),
    _S.COMPLETE_CLOSED: frozenset(),
    _S.CLOSED: frozenset(),
}
for _state, _following in TRANSITIONS.items():
    _state.following = _following


class IllegalTransition(RuntimeError):
    """A programming error: a change of state that the table does not allow."""

    def __init__(self, before: ConnectionState, after: ConnectionState) -> None:
        super().__init__(f"a connection cannot go from {before.name} to {after.name}")
