"""What a manager does to its store before it serves: migrates it, and checks that the store belongs to it.

It comes before the application is built, so that a store of another key ring or machine is one line and exit code 2.
"""

from hypercore_agents.compute.registry import LOCAL_BACKENDS
from hypercore_agents.kit.environment import make_state_dir
from hypercore_agents.kit.linux.state_location import Origin
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.store.database import Database
from hypercore_agents.store.ownership import claim_origin, open_key_ring
from hypercore_agents.store.schema import require_store


async def open_store(settings: ManagerSettings) -> None:
    """Migrate the store; make its key ring, and note where its agents run, if nobody has yet.

    Raises SettingError or SealingError (a key ring, machine or folder that is not the store's), which say what to do.
    """
    make_state_dir(settings.state_dir)
    await require_store(settings.store_url)
    database = Database(settings.store_url)
    try:
        await open_key_ring(database, settings.key_path)
        if settings.compute_backend in LOCAL_BACKENDS:
            await claim_origin(database, Origin.of(settings.state_dir))
    finally:
        await database.close()
