"""Wire models that all roles share: agents, chat, events, errors, ids. Only Pydantic and the standard library."""
