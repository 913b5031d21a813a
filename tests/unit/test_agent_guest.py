"""The guest's modules outside of a microVM: bounded lines, entropy, the standby server and its warm-up."""

import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from hypercore_agents.agent.guest import identity, standby
from hypercore_agents.agent.guest.bounded_lines import BoundedWriter, LineReader
from hypercore_agents.agent.guest.warmup import warm_up
from hypercore_agents.agent.server.app import AgentApplication
from hypercore_agents.api.guest import LONGEST_LINE


def test_lines_are_complete_however_the_data_is_split() -> None:
    reader = LineReader()
    assert reader.feed(b'{"a"') == []
    assert reader.feed(b': {}}\n{"b": {}}\n{"c"') == [b'{"a": {}}', b'{"b": {}}']
    assert reader.feed(b": {}}\n") == [b'{"c": {}}']


def test_a_line_that_is_too_long_is_dropped_and_the_next_one_is_read() -> None:
    reader = LineReader()
    for _ in range(LONGEST_LINE // 1024 + 2):
        assert reader.feed(b"x" * 1024) == []
    assert reader.feed(b'tail\n{"next": {}}\n') == [b"", b'{"next": {}}']


def test_a_bounded_writer_never_blocks_and_counts_dropped_bytes() -> None:
    reading, writing = os.pipe()
    writer = BoundedWriter(writing, limit=100_000)
    for _ in range(100):
        writer.write(b"y" * 10_000)
    assert writer.pending
    assert writer.dropped > 0
    received = 0
    os.set_blocking(reading, False)
    while writer.pending:
        received += len(os.read(reading, 1 << 20))
        writer.flush()
    received += len(os.read(reading, 1 << 20))
    assert received + writer.dropped == 1_000_000
    os.close(reading)
    os.close(writing)


def test_entropy_is_credited_in_bits_and_padded_to_words() -> None:
    bits, size, *rest = struct.unpack("=ii36s", identity.entropy_request(b"e" * 33))
    assert (bits, size) == (33 * 8, 36)
    assert rest == [b"e" * 33 + b"\0\0\0"]


@pytest.mark.root
def test_the_kernel_accepts_the_entropy() -> None:
    identity.add_entropy(os.urandom(64))


def test_numbers_after_reseeding_depend_on_the_entropy_alone() -> None:
    drawn = []
    state = random.getstate()
    try:
        for entropy in (b"a" * 32, b"b" * 32, b"a" * 32):
            random.seed(7)  # the state in a snapshot
            standby.reseed(entropy)
            drawn.append(random.random())
    finally:
        random.setstate(state)
    assert drawn[0] != drawn[1]
    assert drawn[0] == drawn[2]


def test_clones_do_not_share_the_names_of_their_temporary_files() -> None:
    before = tempfile._get_candidate_names()  # type: ignore[attr-defined]
    state = random.getstate()
    try:
        standby.reseed(b"a" * 32)
    finally:
        random.setstate(state)
    assert tempfile._get_candidate_names() is not before  # type: ignore[attr-defined]


def test_a_failed_warm_up_shows_the_servers_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def ends_early(settings: Any, **_: Any) -> None:
        os.close(settings.enrolment_fd)
        os.close(settings.agent_listen_fd)
        sys.stderr.write("the server cannot start\n")

    monkeypatch.setattr("hypercore_agents.agent.server.app.run", ends_early)
    with pytest.raises(ExceptionGroup) as failed:
        warm_up(AgentApplication())
    assert failed.group_contains(RuntimeError, match="ended before the warm-up had sent all requests")
    assert "the server cannot start" in capsys.readouterr().err


def test_the_standby_server_accepts_a_handover_in_pieces() -> None:
    ours, theirs = socket.socketpair()
    line = json.dumps({"entropy": "00", "environment": {"A": "b" * 200_000}}).encode() + b"\n"
    sender = threading.Thread(target=ours.sendall, args=(line,))
    sender.start()
    assert standby.receive_handover(theirs)["environment"]["A"] == "b" * 200_000
    sender.join()
    ours.close()
    theirs.close()


def test_the_standby_server_ends_when_pid_1_has_ended() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with pytest.raises(SystemExit):
        standby.receive_handover(theirs)
    theirs.close()


def test_the_server_gets_its_secret_by_descriptor_and_its_settings_by_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    async def run(settings: Any, *, announce: Any, application: Any) -> None:
        seen["agent_id"] = settings.agent_id
        seen["application"] = application
        with os.fdopen(settings.enrolment_fd, "rb") as pipe:
            seen["secret"] = pipe.read()
        announce()

    for name in ("AGENT_ID", "GATEWAY_URL", "AGENT_STATE_DIR", "ENROLMENT_FD"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores them
    monkeypatch.setattr("hypercore_agents.agent.server.app.run", run)
    announced: list[str] = []
    application = AgentApplication()
    standby.serve(
        {
            "enrolment_secret": "s" * 43,
            "environment": {
                "AGENT_ID": "agent-0123456789abcdef",
                "GATEWAY_URL": "http://10.0.0.1:8090",
                "AGENT_STATE_DIR": str(tmp_path),
            },
        },
        application,
        lambda: announced.append("serving"),
    )
    assert seen == {"agent_id": "agent-0123456789abcdef", "application": application, "secret": b"s" * 43}
    assert announced == ["serving"]
    assert ("s" * 43) not in json.dumps(dict(os.environ))


@pytest.mark.root
def test_a_hardened_machine_has_dropped_unneeded_capabilities_for_good() -> None:
    script = (
        "from hypercore_agents.agent.guest import machine\n"
        "machine._SYSCTLS = ()\n"
        "def bounding(): return int(open('/proc/self/status').read().split('CapBnd:')[1].split()[0], 16)\n"
        "before = bounding(); machine.harden(); print(before, bounding())"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    sys_module, sys_rawio, bpf = 16, 17, 39
    setuid, sys_admin = 7, 21  # the launcher needs these
    if not before >> sys_module & 1:
        pytest.skip("this container has no CAP_SYS_MODULE to drop")
    assert [number for number in (sys_module, sys_rawio, bpf, setuid, sys_admin) if after >> number & 1] == [
        number for number in (setuid, sys_admin) if before >> number & 1
    ]
