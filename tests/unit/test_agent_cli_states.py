"""The states of a session's CLI: which transitions are allowed, and which states hold a capacity slot."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from hypercore_agents.agent.sessions.cli_state import HOLDS_SLOT, TRANSITIONS, CliState, CliStatus, IllegalTransition

PROCESS: Any = SimpleNamespace(alive=True)
TASK: Any = SimpleNamespace()


def status_in(state: CliState) -> CliStatus:
    status = CliStatus()
    status.state, status.holds_slot = state, state in HOLDS_SLOT
    return status


def test_a_session_goes_from_parked_to_live_and_back() -> None:
    status = CliStatus()
    seen = [status.state]
    status.take_slot()
    seen.append(status.state)
    status.start_begins()
    status.start_task = TASK
    seen.append(status.state)
    assert status.is_starting
    status.connected(PROCESS)
    status.start_done()
    seen.append(status.state)
    assert (status.is_running, status.is_starting) == (True, False)
    status.process_ended()
    seen.append(status.state)
    status.release_slot()
    seen.append(status.state)
    assert seen == ["parked", "admitted", "starting", "live", "admitted", "parked"]


def test_a_session_holds_its_slot_after_a_failed_start() -> None:
    status = status_in(CliState.ADMITTED)
    status.start_begins()
    status.start_done()
    assert (status.state, status.holds_slot) == ("admitted", True)
    status.release_slot()
    status.release_slot()
    assert (status.state, status.holds_slot) == ("parked", False)


def test_a_live_session_whose_cli_died_can_start_another() -> None:
    status = status_in(CliState.LIVE)
    status.process = cast(Any, SimpleNamespace(alive=False))
    assert not status.is_running
    status.start_begins()
    status.process_ended()
    assert (status.state, status.process) == ("starting", None)


@pytest.mark.parametrize("state", list(CliState))
def test_an_ending_session_holds_its_slot_until_it_is_released(state: CliState) -> None:
    status = status_in(state)
    status.end()
    status.end()
    assert status.has_ended
    assert status.holds_slot == (state in HOLDS_SLOT)
    status.connected(PROCESS)  # of a start that was under way
    status.process_ended()
    status.release_slot()
    status.release_slot()
    assert status.state == "ended"
    with pytest.raises(IllegalTransition):
        status.take_slot()
    with pytest.raises(IllegalTransition):
        status.start_begins()


def test_a_live_session_does_not_release_its_slot() -> None:
    with pytest.raises(IllegalTransition):
        status_in(CliState.LIVE).release_slot()


def test_every_state_has_transitions_and_only_ended_has_none() -> None:
    assert set(TRANSITIONS) == set(CliState)
    assert [state for state, following in TRANSITIONS.items() if not following] == [CliState.ENDED]
