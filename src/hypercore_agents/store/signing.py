"""Until when tokens signed under a key of the key ring may be valid.

Gateways record it before they sign, so that `keys prune` can tell whether a valid token may still need a retired key.
"""

from collections.abc import Iterable

from hypercore_agents.store import installation
from hypercore_agents.store.database import Connection

_PREFIX = "signing:"


async def note_signing(connection: Connection, key_id: str, *, until: float, now: float) -> None:
    """Record that tokens under this key may be valid until a time, unless a later time is recorded."""
    noted = await installation.get_note(connection, _PREFIX + key_id)
    if noted is None or noted["until"] < until:
        await installation.put_note(connection, _PREFIX + key_id, {"until": until}, now=now)


async def signed_until(connection: Connection) -> dict[str, float]:
    """Return the latest time at which a token may still be valid, by key id, in Unix seconds."""
    notes = await installation.notes_under(connection, _PREFIX)
    return {key_id: float(note["until"]) for key_id, note in notes.items()}


async def forget_signing(connection: Connection, key_ids: Iterable[str]) -> None:
    """Delete the records of keys that left the ring."""
    for key_id in key_ids:
        await installation.delete_note(connection, _PREFIX + key_id)
