"""Building blocks on asyncio: supervised tasks, a keyed work queue, a thread for blocking work."""
