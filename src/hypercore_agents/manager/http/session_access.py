"""Which sessions a request may see. Routes of sessions are there twice: by the pool's address and by an agent's own."""

from typing import Annotated

from fastapi import Depends

from hypercore_agents.api.errors import NotFound
from hypercore_agents.api.ids import UserId
from hypercore_agents.manager.http.auth import Caller, Who
from hypercore_agents.manager.sessions.sessions import SessionScope


async def _within_pool(caller: Who, user_id: UserId | None = None) -> SessionScope:
    return _reach(caller, user_id, None)


async def _within_agent(agent_id: str, caller: Who, user_id: UserId | None = None) -> SessionScope:
    return _reach(caller, user_id, agent_id)


def _reach(caller: Caller, user_id: str | None, agent_id: str | None) -> SessionScope:
    """Return what the caller may see here. A thing of another user's is not found, rather than forbidden."""
    user = caller.acting_for(None)
    if user is not None and user_id is not None and user != user_id:
        raise NotFound("there is no such session")
    return SessionScope(user_id=user or user_id, agent_id=agent_id)


WithinPool = Annotated[SessionScope, Depends(_within_pool)]
"""For routes by the pool's address; with it comes the parameter `user_id`."""
WithinAgent = Annotated[SessionScope, Depends(_within_agent)]
"""For routes under `/agents/{agent_id}`."""
