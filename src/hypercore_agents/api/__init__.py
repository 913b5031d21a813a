"""Wire models that every role shares: agents, chat, events, errors, ids. Pydantic and stdlib only."""
