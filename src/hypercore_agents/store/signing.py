"""Until when tokens may live that were signed under a key of the key ring.

Gateways note it ahead of what they sign, so that `keys prune` knows when a retired key is of no use to any token.
"""

from collections.abc import Iterable

from hypercore_agents.store import installation
from hypercore_agents.store.database import Connection

_PREFIX = "signing:"


async def note_signing(connection: Connection, key_id: str, *, until: float, now: float) -> None:
    """Note that tokens under this key may live until a time, unless a later one is noted already."""
    noted = await installation.get_note(connection, _PREFIX + key_id)
    if noted is None or noted["until"] < until:
        await installation.put_note(connection, _PREFIX + key_id, {"until": until}, now=now)


async def signed_until(connection: Connection) -> dict[str, float]:
    """Return the latest time at which a token may still be alive, by key id, in Unix seconds."""
    notes = await installation.notes_under(connection, _PREFIX)
    return {key_id: float(note["until"]) for key_id, note in notes.items()}


async def forget_signing(connection: Connection, key_ids: Iterable[str]) -> None:
    """Drop what is noted about keys that left the ring."""
    for key_id in key_ids:
        await installation.delete_note(connection, _PREFIX + key_id)
