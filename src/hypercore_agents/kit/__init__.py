"""Building blocks that are independent of agents: the relay, asyncio helpers, limits, Linux helpers, settings."""
