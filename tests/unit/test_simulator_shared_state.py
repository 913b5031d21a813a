import subprocess
import sys
from pathlib import Path

from hypercore_agents.simulator.counts import Counts
from hypercore_agents.simulator.shared_state import Ledger

COUNT_FROM_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from hypercore_agents.simulator.shared_state import Ledger

ledger = Ledger(Path(sys.argv[1]), 1 << 20)
for _ in range(300):
    print(ledger.count("key"))
    ledger.record({"session_id": sys.argv[2], "body": "x" * 50})
ledger.close()
"""


def entry(number: int, session: str = "s", size: int = 10) -> dict[str, object]:
    return {"number": number, "session_id": session, "body": "x" * size}


def numbers(ledger: Ledger, limit: int = 1000, session: str | None = None) -> list[int]:
    return [each["number"] for each in ledger.read(limit, session)]


def test_records_are_read_newest_last_by_session_and_up_to_a_limit(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 1 << 20)
    for number in range(6):
        ledger.record(entry(number, "even" if number % 2 == 0 else "odd"))
    assert numbers(ledger) == [0, 1, 2, 3, 4, 5]
    assert numbers(ledger, 2) == [4, 5]
    assert numbers(ledger, 2, "even") == [2, 4]
    assert numbers(ledger, 2, "absent") == []
    ledger.clear()
    assert numbers(ledger) == []
    ledger.close()


def test_the_disk_used_is_bounded_and_the_newest_are_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 4000)
    for number in range(500):
        ledger.record(entry(number, size=100))
        assert sum(path.stat().st_size for path in tmp_path.glob("requests*")) <= 4000
    kept = numbers(ledger)
    assert kept == list(range(kept[0], 500))
    assert len(kept) >= 10
    ledger.close()


def test_an_entry_that_is_too_large_loses_its_body(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 4000)
    ledger.record(entry(1, size=5000))
    assert ledger.read(1) == [{"number": 1, "session_id": "s", "body": None}]
    ledger.close()


def test_counts_and_records_hold_across_processes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 1 << 20)
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
    assert len(ledger.read(1000)) == 600
    assert len(ledger.read(1000, "a")) == 300
    ledger.clear()
    assert ledger.count("key") == 1
    ledger.close()


def test_totals_are_over_all_workers_and_survive_one_that_is_replaced(tmp_path: Path) -> None:
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
