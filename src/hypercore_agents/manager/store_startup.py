"""Prepares the store before the manager serves: migrates it, and checks that it belongs to this key ring and machine.

This runs before the application is built, so that a store of another key ring or machine ends the process with a
one-line error and exit code 2.
"""

from hypercore_agents.compute.registry import LOCAL_BACKENDS
from hypercore_agents.kit.environment import make_state_dir
from hypercore_agents.kit.linux.state_location import StateLocation
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.store.database import Database
from hypercore_agents.store.ownership import claim_state_location, open_key_ring
from hypercore_agents.store.schema import require_store


async def open_store(settings: ManagerSettings) -> None:
    """Migrate the store. If missing, create its key ring and record where its agents run.

    Raises SettingError or SealingError if the key ring, machine or folder is not the store's; the message names the
    remedy.
    """
    make_state_dir(settings.state_dir)
    await require_store(settings.store_url)
    database = Database(settings.store_url)
    try:
        await open_key_ring(database, settings.key_path)
        if settings.compute_backend in LOCAL_BACKENDS:
            await claim_state_location(database, StateLocation.of(settings.state_dir))
    finally:
        await database.close()
