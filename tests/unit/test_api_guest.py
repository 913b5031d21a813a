"""Messages between the host and the guest of a microVM: which are accepted, which are refused, and the errors."""

import pytest

from hypercore_agents.api.guest import (
    LONGEST_LINE,
    BootParameters,
    GuestProtocolError,
    Identity,
    message,
    parse_message,
)

IDENTITY = Identity(
    agent_id="agent-0123456789abcdef",
    hostname="agent-0123456789abcdef",
    clock=1_800_000_000.5,
    entropy=bytes(range(64)),
    enrolment_secret="s" * 43,
    environment={"LOG_LEVEL": "DEBUG"},
)


def test_an_identity_round_trips_through_its_line() -> None:
    kind, body = parse_message(IDENTITY.line())
    assert kind == "identity"
    assert Identity.parse(body) == IDENTITY


def test_the_repr_of_an_identity_has_no_secrets() -> None:
    assert "sss" not in repr(IDENTITY)
    assert "entropy" not in repr(IDENTITY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("agent_id", ""),
        ("agent_id", 7),
        ("hostname", "two.labels"),
        ("hostname", "x" * 64),
        ("clock", "now"),
        ("clock", True),
        ("clock", 12),
        ("entropy", "zz"),
        ("entropy", "00" * 31),
        ("enrolment_secret", None),
        ("environment", {"A": 1}),
        ("environment", {"A=B": "c"}),
        ("environment", {"A": "b\0"}),
        ("environment", []),
    ],
)
def test_invalid_identities_are_refused_with_the_field(name: str, value: object) -> None:
    body = parse_message(IDENTITY.line())[1] | {name: value}
    with pytest.raises(GuestProtocolError, match=f"identity.{name}") as refusal:
        Identity.parse(body)
    assert "sss" not in str(refusal.value)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"nonsense",
        b"[]",
        b'{"a": {}, "b": {}}',
        b'{"a": 1}',
        b"\xff\xfe",
        b"[" * 5000,
        message("a", b="x" * LONGEST_LINE),
    ],
    ids=range(8),
)
def test_lines_that_are_not_messages_are_refused(line: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        parse_message(line)


def test_boot_parameters_round_trip_through_the_kernel_command_line() -> None:
    parameters = BootParameters("10.77.0.2/30", "10.77.0.1", "http://10.77.0.1:8090", "DEBUG")
    assert BootParameters.parse(f"console=ttyS0 quiet {parameters.command_line()} panic=-1\n") == parameters


@pytest.mark.parametrize(
    ("command_line", "named"),
    [
        ("", "hypercore.address"),
        ("hypercore.address=10.0.0.2/30 hypercore.gateway_url=http://10.0.0.1:1", "hypercore.router"),
        ("hypercore.address=10.0.0.2/30 hypercore.router=10.0.0.1", "hypercore.gateway_url"),
        ("hypercore.address=here hypercore.router=10.0.0.1 hypercore.gateway_url=http://a:1", "is not an address"),
    ],
)
def test_incomplete_kernel_command_lines_are_refused(command_line: str, named: str) -> None:
    with pytest.raises(GuestProtocolError, match=named):
        BootParameters.parse(command_line)
