"""Envelope encryption of secrets at rest.

Each secret is encrypted with its own data key (AES-256-GCM), and the data key with a key-encryption key of the key ring
(also AES-256-GCM). The owner is associated data of both, so a ciphertext that is copied to another owner's row cannot
be decrypted. Rotation creates a new key-encryption key and re-wraps the data keys, without decrypting the secrets.

The ring is a JSON file of mode 0600 with base64 keys by id. A file that others can read is rejected, not repaired,
because it may have been read.

Rejected: one key for all secrets without data keys (a rotation would have to decrypt every secret).
"""

import base64
import json
import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_VERSION = 1
_NONCE = 12
_KEY = 32
_ID = 8


class SealingError(Exception):
    """A sealed secret cannot be decrypted (wrong owner, wrong ring, damaged), or the key ring is unusable."""


@dataclass(frozen=True)
class KeyRing:
    """Key-encryption keys by id (8 bytes as hex). The primary key encrypts, all keys decrypt."""

    primary: str
    keys: dict[str, bytes]

    def __repr__(self) -> str:
        return f"KeyRing(primary={self.primary!r}, {len(self.keys)} keys)"

    @staticmethod
    def generate() -> "KeyRing":
        """Return a ring with one new key."""
        key_id = secrets.token_hex(_ID)
        return KeyRing(key_id, {key_id: secrets.token_bytes(_KEY)})

    def rotated(self) -> "KeyRing":
        """Return this ring with a new primary key; old keys remain until all secrets are re-wrapped."""
        fresh = KeyRing.generate()
        return KeyRing(fresh.primary, {**self.keys, **fresh.keys})

    def keeping(self, *retired: str) -> "KeyRing":
        """Return this ring with only its primary key and these keys."""
        return KeyRing(self.primary, {key_id: self.keys[key_id] for key_id in (*retired, self.primary)})

    def dump(self) -> str:
        """Return the ring as JSON, which is secret."""
        encoded = {key_id: base64.b64encode(key).decode() for key_id, key in self.keys.items()}
        return json.dumps({"version": _VERSION, "primary": self.primary, "keys": encoded})

    @staticmethod
    def parse(text: str) -> "KeyRing":
        """Parse a ring from JSON. Raises SealingError, which never quotes the text."""
        try:
            data = json.loads(text)
            keys = {str(key_id): base64.b64decode(key, validate=True) for key_id, key in data["keys"].items()}
            ring = KeyRing(str(data["primary"]), keys)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SealingError("the key ring is not valid JSON of the expected form") from None
        if ring.primary not in keys or any(len(key) != _KEY for key in keys.values()):
            raise SealingError("the key ring has no primary key, or a key that is not 32 bytes")
        if any(len(key_id) != 2 * _ID or not _is_hex(key_id) for key_id in keys):
            raise SealingError(f"every key id in the key ring must be {2 * _ID} hex digits")
        return ring

    @staticmethod
    def load(path: Path) -> "KeyRing":
        """Read the ring from its file. Raises SealingError if it is missing, damaged or readable by others."""
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            text = path.read_bytes().decode(errors="replace")
        except OSError as error:
            raise SealingError(f"cannot read the key file {path} (KEY_FILE): {error.strerror}") from error
        if mode & 0o077:
            raise SealingError(
                f"the key file {path} (KEY_FILE) has mode {mode:04o}; others must not read it: chmod 600 {path}"
            )
        try:
            return KeyRing.parse(text)
        except SealingError as error:
            raise SealingError(f"the key file {path} (KEY_FILE) cannot be used: {error}") from None

    def save(self, path: Path) -> None:
        """Write the ring atomically with mode 0600, synced to disk before it is renamed."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(self.dump())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @staticmethod
    def load_or_create(path: Path) -> "KeyRing":
        """Read the ring, or create one if there is no file. If two processes start at once, both use the same ring."""
        if not path.exists():
            fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            try:
                KeyRing.generate().save(fresh)
                try:
                    os.link(fresh, path)
                except FileExistsError:
                    pass
                finally:
                    fresh.unlink()
            except OSError as error:
                raise SealingError(f"cannot write the key file {path} (KEY_FILE): {error.strerror}") from None
        return KeyRing.load(path)


class KeyRingFile:
    """The file of a key ring, which may be rotated while processes use it: each use reads the present content."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._ring = self()

    def __call__(self) -> KeyRing:
        """Return the ring; read it again if the file was replaced. Raises SealingError."""
        try:
            found = self._path.stat()
        except OSError as error:
            raise SealingError(f"cannot read the key file {self._path}: {error.strerror}") from error
        if (seen := (found.st_ino, found.st_mtime_ns)) != self._seen:
            self._ring, self._seen = KeyRing.load(self._path), seen
        return self._ring


class Sealer:
    """Seals and opens secrets for owners. `ring` is a fixed key ring, or returns the present one at each use."""

    def __init__(self, ring: KeyRing | Callable[[], KeyRing]) -> None:
        self._source: Callable[[], KeyRing] = (lambda: ring) if isinstance(ring, KeyRing) else ring

    @property
    def _ring(self) -> KeyRing:
        return self._source()

    def seal(self, secret: str, owner: str) -> bytes:
        """Return the secret encrypted for this owner."""
        data_key = secrets.token_bytes(_KEY)
        nonce = secrets.token_bytes(_NONCE)
        body = nonce + AESGCM(data_key).encrypt(nonce, secret.encode(), _associated(owner))
        return self._wrap(data_key, owner) + body

    def open(self, sealed: bytes, owner: str) -> str:
        """Return the secret. Raises SealingError if owner, ring or bytes do not match."""
        data_key, body = self._unwrap(sealed, owner)
        try:
            return AESGCM(data_key).decrypt(body[:_NONCE], body[_NONCE:], _associated(owner)).decode()
        except (InvalidTag, ValueError):
            raise SealingError("a sealed secret cannot be decrypted for this owner") from None

    def rewrap(self, sealed: bytes, owner: str) -> bytes:
        """Return the same secret with its data key encrypted under the primary key."""
        data_key, body = self._unwrap(sealed, owner)
        return self._wrap(data_key, owner) + body

    def key_id(self, sealed: bytes) -> str:
        """Return the id of the key-encryption key that this secret needs."""
        return sealed[1 : 1 + _ID].hex()

    def _wrap(self, data_key: bytes, owner: str) -> bytes:
        ring = self._ring
        nonce = secrets.token_bytes(_NONCE)
        wrapped = AESGCM(ring.keys[ring.primary]).encrypt(nonce, data_key, _associated(owner))
        return bytes([_VERSION]) + bytes.fromhex(ring.primary) + nonce + wrapped

    def _unwrap(self, sealed: bytes, owner: str) -> tuple[bytes, bytes]:
        head = 1 + _ID
        end = head + _NONCE + _KEY + 16
        if len(sealed) < end + _NONCE + 16 or sealed[0] != _VERSION:
            raise SealingError("a sealed secret is damaged or of an unknown version")
        key = self._ring.keys.get(sealed[1:head].hex())
        if key is None:
            raise SealingError("the key ring does not have the key under which a secret was sealed")
        try:
            data_key = AESGCM(key).decrypt(
                sealed[head : head + _NONCE], sealed[head + _NONCE : end], _associated(owner)
            )
        except InvalidTag:
            raise SealingError("a sealed secret cannot be decrypted for this owner") from None
        return data_key, sealed[end:]


def derive_key(ring: KeyRing, purpose: str) -> bytes:
    """Return 32 bytes for one purpose (HKDF-SHA256, RFC 5869) from the ring's primary key."""
    return HKDF(hashes.SHA256(), _KEY, salt=None, info=f"hypercore-agents/{purpose}".encode()).derive(
        ring.keys[ring.primary]
    )


def _associated(owner: str) -> bytes:
    return f"hypercore-agents/sealed/{owner}".encode()


def _is_hex(text: str) -> bool:
    try:
        bytes.fromhex(text)
    except ValueError:
        return False
    return True
