"""Sealing, tokens, bearers and enrolment: what is accepted, and what is rejected."""

import base64
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypercore_agents.api.errors import InvalidRequest, Unauthenticated
from hypercore_agents.api.internal import AgentConfiguration, EnrolmentGrant
from hypercore_agents.security import bearers
from hypercore_agents.security.enrolment import EnrolmentKey, seal_grant
from hypercore_agents.security.sealing import KeyRing, KeyRingFile, Sealer, SealingError, derive_key
from hypercore_agents.security.tokens import TokenSigner

SECRET = "sk-ant-canary-0123456789"


@given(st.text(), st.text())
def test_a_sealed_secret_opens_for_its_owner(secret: str, owner: str) -> None:
    sealer = Sealer(KeyRing.generate())
    assert sealer.open(sealer.seal(secret, owner), owner) == secret


def test_a_sealed_secret_does_not_open_for_others() -> None:
    sealer = Sealer(KeyRing.generate())
    sealed = sealer.seal(SECRET, "user:ada")
    assert SECRET.encode() not in sealed
    with pytest.raises(SealingError):
        sealer.open(sealed, "user:bob")
    with pytest.raises(SealingError):
        Sealer(KeyRing.generate()).open(sealed, "user:ada")


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_a_flipped_bit_is_detected(position: int, flip: int) -> None:
    sealer = Sealer(KeyRing.generate())
    sealed = bytearray(sealer.seal(SECRET, "user:ada"))
    sealed[position % len(sealed)] ^= flip
    with pytest.raises(SealingError):
        sealer.open(bytes(sealed), "user:ada")


@given(st.binary(max_size=200))
def test_random_bytes_do_not_open(garbage: bytes) -> None:
    with pytest.raises(SealingError):
        Sealer(KeyRing.generate()).open(garbage, "user:ada")


def test_old_keys_can_be_removed_after_rotation() -> None:
    ring = KeyRing.generate()
    sealed = Sealer(ring).seal(SECRET, "user:ada")
    rotated = ring.rotated()
    assert rotated.primary != ring.primary
    rewrapped = Sealer(rotated).rewrap(sealed, "user:ada")
    assert Sealer(rotated).key_id(rewrapped) == rotated.primary
    assert Sealer(rotated.keeping()).open(rewrapped, "user:ada") == SECRET
    with pytest.raises(SealingError, match="does not have the key"):
        Sealer(rotated.keeping()).open(sealed, "user:ada")


def test_the_key_file_is_private_and_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ring = KeyRing.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KeyRing.load_or_create(path) == ring
    assert [file.name for file in tmp_path.iterdir()] == ["keys.json"]
    assert all(base64.b64encode(key).decode() not in repr(ring) for key in ring.keys.values())


def test_a_running_process_reads_a_rotated_key_ring(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ring = KeyRing.load_or_create(path)
    sealer = Sealer(KeyRingFile(path))
    before = sealer.seal(SECRET, "user:ada")
    ring.rotated().save(path)
    after = sealer.seal(SECRET, "user:ada")
    assert sealer.key_id(before) == ring.primary
    assert sealer.key_id(after) == KeyRing.load(path).primary != ring.primary
    assert sealer.open(before, "user:ada") == sealer.open(after, "user:ada") == SECRET


def test_concurrent_starts_create_one_key_ring(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    rings: list[KeyRing] = []
    threads = [threading.Thread(target=lambda: rings.append(KeyRing.load_or_create(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({ring.primary for ring in rings}) == 1


def test_a_key_file_readable_by_others_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    KeyRing.generate().save(path)
    path.chmod(0o640)
    with pytest.raises(SealingError, match="chmod 600"):
        KeyRing.load(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"primary": "x", "keys": {}}', '{"primary":"00","keys":{"00":"AA=="}}']
)
def test_a_damaged_key_file_is_rejected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(SealingError, match="key ring"):
        KeyRing.load(path)


def test_derived_keys_differ_by_purpose() -> None:
    ring = KeyRing.generate()
    assert derive_key(ring, "a") == derive_key(ring, "a")
    assert derive_key(ring, "a") != derive_key(ring, "b")


def test_tokens_are_valid_for_their_own_kind_only() -> None:
    signer = TokenSigner(b"k" * 32)
    agent, _ = signer.agent_token("agent-1", now=100.0, lifetime=60)
    session, expires_at = signer.session_token("agent-1", "s-1", 3, now=100.0, lifetime=60)
    assert signer.check_agent_token(agent, now=159.0).agent_id == "agent-1"
    claims = signer.check_session_token(session, now=159.0)
    assert (claims.agent_id, claims.session_id, claims.generation, claims.expires_at) == (
        "agent-1",
        "s-1",
        3,
        expires_at,
    )
    for token, check in ((agent, signer.check_session_token), (session, signer.check_agent_token)):
        with pytest.raises(Unauthenticated, match="the token is not"):
            check(token, now=101.0)
    for token, check in ((agent, signer.check_agent_token), (session, signer.check_session_token)):
        with pytest.raises(Unauthenticated, match="expired"):
            check(token, now=160.0)


def _unsigned(token: str) -> str:
    header = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
    return f"{header}.{token.split('.')[1]}."


def test_tokens_of_other_signers_are_rejected() -> None:
    signer = TokenSigner(b"k" * 32)
    token, _ = signer.agent_token("agent-1", now=100.0, lifetime=60)
    foreign, _ = TokenSigner(b"x" * 32).agent_token("agent-1", now=100.0, lifetime=60)
    for bad in ("", "a.b.c", token[:-2], token + "x", foreign, _unsigned(token)):
        with pytest.raises(Unauthenticated):
            signer.check_agent_token(bad, now=101.0)


def test_bearers() -> None:
    bearer = bearers.new_bearer()
    assert bearers.presented(f"Bearer {bearer}") == bearer
    assert bearers.presented(f"bearer {bearer}") == bearer
    assert bearers.presented(None) is None
    assert bearers.presented("Basic eA==") is None
    assert bearers.presented("Bearer ") is None
    assert bearers.matches(bearer, bearer)
    assert not bearers.matches(bearer[:-1], bearer)
    assert not bearers.matches(None, bearer)
    assert bearer not in bearers.digest(bearer)


def _grant() -> EnrolmentGrant:
    return EnrolmentGrant(
        agent_token="t", expires_at=1.0, bearer="b", configuration=AgentConfiguration(max_concurrent=1, tools=False)
    )


def test_a_grant_opens_only_for_its_agent() -> None:
    key = EnrolmentKey()
    sealed = seal_grant(_grant(), key.public(), "agent-1")
    assert key.open(sealed, "agent-1") == _grant()
    for other, agent_id in ((EnrolmentKey(), "agent-1"), (key, "agent-2")):
        with pytest.raises(InvalidRequest):
            other.open(sealed, agent_id)


def test_an_invalid_public_key_is_rejected() -> None:
    with pytest.raises(InvalidRequest, match="public_key"):
        seal_grant(_grant(), base64.b64encode(b"short").decode(), "agent-1")
