"""asyncio building blocks: supervised tasks, a keyed work queue, and a lane for blocking work."""
