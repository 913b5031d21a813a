import subprocess
import sys
from pathlib import Path

from hypercore_agents.simulator.counts import Counts
from hypercore_agents.simulator.shared_state import SharedState

COUNT_FROM_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from hypercore_agents.simulator.shared_state import SharedState

shared = SharedState(Path(sys.argv[1]), 1 << 20)
for _ in range(300):
    print(shared.count("key"))
    shared.record({"session_id": sys.argv[2], "body": "x" * 50})
shared.close()
"""


def entry(number: int, session: str = "s", size: int = 10) -> dict[str, object]:
    return {"number": number, "session_id": session, "body": "x" * size}


def numbers(shared: SharedState, limit: int = 1000, session: str | None = None) -> list[int]:
    return [each["number"] for each in shared.read(limit, session)]


def test_records_are_listed_newest_last_by_session_and_limit(tmp_path: Path) -> None:
    shared = SharedState(tmp_path, 1 << 20)
    for number in range(6):
        shared.record(entry(number, "even" if number % 2 == 0 else "odd"))
    assert numbers(shared) == [0, 1, 2, 3, 4, 5]
    assert numbers(shared, 2) == [4, 5]
    assert numbers(shared, 2, "even") == [2, 4]
    assert numbers(shared, 2, "absent") == []
    shared.clear()
    assert numbers(shared) == []
    shared.close()


def test_disk_usage_is_bounded_and_the_newest_records_remain(tmp_path: Path) -> None:
    shared = SharedState(tmp_path, 4000)
    for number in range(500):
        shared.record(entry(number, size=100))
        assert sum(path.stat().st_size for path in tmp_path.glob("requests*")) <= 4000
    remaining = numbers(shared)
    assert remaining == list(range(remaining[0], 500))
    assert len(remaining) >= 10
    shared.close()


def test_oversized_entries_are_recorded_without_their_body(tmp_path: Path) -> None:
    shared = SharedState(tmp_path, 4000)
    shared.record(entry(1, size=5000))
    assert shared.read(1) == [{"number": 1, "session_id": "s", "body": None}]
    shared.close()


def test_counts_and_records_are_shared_across_processes(tmp_path: Path) -> None:
    shared = SharedState(tmp_path, 1 << 20)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COUNT_FROM_ANOTHER_PROCESS, str(tmp_path), name], stdout=subprocess.PIPE, text=True
        )
        for name in ("a", "b")
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    counted = sorted(int(line) for output in outputs for line in output.split())
    assert counted == list(range(1, 601))
    assert len(shared.read(1000)) == 600
    assert len(shared.read(1000, "a")) == 300
    shared.clear()
    assert shared.count("key") == 1
    shared.close()


def test_totals_cover_all_workers_and_survive_a_replacement(tmp_path: Path) -> None:
    first, second = Counts(tmp_path, 0, 2), Counts(tmp_path, 1, 2)
    for counts in (first, second, second):
        counts.request()
        counts.opened()
    second.closed()
    first.tokens(10)
    assert second.totals() == {
        "open_streams": 2,
        "requests": 3,
        "tokens": 10,
        "faults": 0,
        "peak_streams": 3,
        "workers": 2,
    }
    second.close()
    replacement = Counts(tmp_path, 1, 2)
    assert replacement.totals()["open_streams"] == 1
    assert replacement.totals()["requests"] == 3
    replacement.close()
    first.close()
