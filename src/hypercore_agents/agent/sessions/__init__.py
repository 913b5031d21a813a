"""Sessions of an agent: the registry, one session, one turn, the capacity for live sessions, and parking."""
