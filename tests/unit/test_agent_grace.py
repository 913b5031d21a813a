"""An agent that its manager stops finishes its drain before the manager kills it."""

from pathlib import Path

from hypercore_agents.agent.sessions import shutdown
from hypercore_agents.agent.settings import AgentSettings
from hypercore_agents.api.internal import DRAIN_RESERVE_SECONDS
from hypercore_agents.manager.fleet.reconciler import FleetRules
from hypercore_agents.manager.fleet_settings import fleet_rules
from hypercore_agents.manager.settings import ManagerSettings


def rules(tmp_path: Path, **settings: float) -> FleetRules:
    return fleet_rules(ManagerSettings(_env_file=None, state_dir=tmp_path, **settings))  # type: ignore[arg-type]


def test_an_agents_drain_fits_into_its_managers_stop_grace(tmp_path: Path) -> None:
    interrupt_grace = AgentSettings.model_fields["interrupt_grace"].default
    after_turns = 2 * interrupt_grace + shutdown.LAST_ARCHIVES_SECONDS + shutdown.STORE_SECONDS
    assert after_turns <= DRAIN_RESERVE_SECONDS
    default = rules(tmp_path)
    assert float(default.environment["DRAIN_GRACE"]) + DRAIN_RESERVE_SECONDS <= default.stop_grace
    assert float(default.environment["DRAIN_GRACE"]) > 0, "running turns get some time"
    assert AgentSettings.model_fields["drain_grace"].default + DRAIN_RESERVE_SECONDS <= default.stop_grace
    for grace in (0, 5, 60):
        given = rules(tmp_path, stop_grace=grace)
        assert float(given.environment["DRAIN_GRACE"]) == max(0, grace - DRAIN_RESERVE_SECONDS)
