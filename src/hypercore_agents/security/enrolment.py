"""The cryptography of enrolment: the agent's key pair, and the grant sealed to it.

The answer to an enrolment is an HPKE message (RFC 9180: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM) to the
public key in the request, bound to the agent's id. So an agent can repeat the request with the same key if the answer
is lost, and the secret and the public key do not suffice to read the answer.
"""

import base64
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.api.internal import EnrolmentGrant


class EnrolmentKey:
    """An agent's key pair, generated in the sandbox after it has its identity; never written to disk.

    The key comes directly from the kernel's random numbers: after a snapshot, a library's own generator would have the
    same state in every clone.
    """

    def __init__(self) -> None:
        self._private = X25519PrivateKey.from_private_bytes(os.urandom(32))

    def public(self) -> str:
        """Return the public key, base64 of 32 bytes."""
        return base64.b64encode(self._private.public_key().public_bytes_raw()).decode()

    def open(self, sealed: str, agent_id: str) -> EnrolmentGrant:
        """Return the grant. Raises InvalidRequest if it was not sealed to this key for this agent."""
        try:
            plain = _suite().decrypt(base64.b64decode(sealed, validate=True), self._private, _info(agent_id))
        except (InvalidTag, ValueError):
            raise InvalidRequest("the enrolment's answer cannot be decrypted with this agent's key") from None
        return EnrolmentGrant.model_validate_json(plain)


def seal_grant(grant: EnrolmentGrant, public_key: str, agent_id: str) -> str:
    """Seal a grant to an agent's public key. Raises InvalidRequest if the key is not an X25519 public key."""
    try:
        public = X25519PublicKey.from_public_bytes(base64.b64decode(public_key, validate=True))
        sealed = _suite().encrypt(grant.model_dump_json().encode(), public, _info(agent_id))
    except ValueError:
        raise InvalidRequest("public_key must be base64 of an X25519 public key", field="public_key") from None
    return base64.b64encode(sealed).decode()


def _suite() -> Suite:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _info(agent_id: str) -> bytes:
    return f"hypercore-agents/enrolment/{agent_id}".encode()
