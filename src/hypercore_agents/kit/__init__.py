"""Building blocks on asyncio and aiohttp that know nothing of agents: relay, tasks, work queue."""
