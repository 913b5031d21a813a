"""How an agent becomes an agent: the one-use secret in, the grant out.

The secret comes over an inherited descriptor, is read once, and is forgotten when enrolment ended. The key pair is made
here, in the sandbox. An answer may get lost: the same key may ask again, and the gateway answers the same for 60 s; so
every retry repeats the same request. A refusal (4xx) is final: a replayed or expired secret does not get better.
"""

import asyncio
import contextlib
import os
import select
import time

import aiohttp
import structlog
from pydantic import ValidationError

from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.api.internal import EnrolmentGrant, EnrolRequest, EnrolResponse
from hypercore_agents.security.enrolment import EnrolmentKey

_log = structlog.get_logger(__name__)
_LONGEST_SECRET = 4096
_ATTEMPT_SECONDS = 10.0


class EnrolmentFailed(Exception):
    """This agent cannot enrol and must not serve; the message says why."""


async def enrol(agent_id: str, gateway_url: str, descriptor: int, *, timeout: float) -> EnrolmentGrant:
    """Read the secret, close its descriptor, and return the grant. Raises EnrolmentFailed within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    if _is_written(descriptor):
        secret = read_secret(descriptor, timeout)  # at once; a thread would cost a restored VM half a megabyte
    else:
        secret = await asyncio.to_thread(read_secret, descriptor, timeout)
    key = EnrolmentKey()
    try:
        request = EnrolRequest(agent_id=agent_id, secret=secret, public_key=key.public())
    except ValidationError:
        raise EnrolmentFailed("the enrolment secret is malformed; the backend must send 32 to 128 characters") from None
    body = request.model_dump_json().encode()
    pause = 0.1
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ATTEMPT_SECONDS)) as client:
        while True:
            try:
                return await _ask(client, gateway_url, body, key, agent_id)
            except (aiohttp.ClientError, TimeoutError, _TryAgain) as error:
                if time.monotonic() + pause >= deadline:
                    raise EnrolmentFailed(f"the gateway {gateway_url} did not enrol this agent: {error}") from None
                _log.warning("enrolment.retry", gateway=gateway_url, error=str(error) or type(error).__name__)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)


def _is_written(descriptor: int) -> bool:
    """Say whether reading to the end cannot wait: the pipe's other end is closed, or there is no pipe."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return any(events & (select.POLLHUP | select.POLLNVAL) for _, events in poll.poll(0))


def read_secret(descriptor: int, timeout: float) -> str:
    """Read the secret to the end of the pipe and close the descriptor. Blocking; raises EnrolmentFailed."""
    deadline = time.monotonic() + timeout
    parts: list[bytes] = []
    try:
        os.set_inheritable(descriptor, False)
        while sum(map(len, parts)) <= _LONGEST_SECRET:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise EnrolmentFailed("the enrolment secret did not come in time over ENROLMENT_FD")
            part = os.read(descriptor, _LONGEST_SECRET)
            if not part:
                break
            parts.append(part)
    except OSError as error:
        raise EnrolmentFailed(
            f"ENROLMENT_FD={descriptor} cannot be read ({error.strerror}); the backend must hand the descriptor down"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    return b"".join(parts).decode("ascii", errors="replace").strip()


class _TryAgain(Exception):
    pass


async def _ask(
    client: aiohttp.ClientSession, gateway_url: str, body: bytes, key: EnrolmentKey, agent_id: str
) -> EnrolmentGrant:
    async with client.post(
        f"{gateway_url}/internal/enrol",
        data=body,
        headers={"content-type": "application/json"},
        allow_redirects=False,
    ) as answer:
        content = await answer.read()
        if answer.status == 429 or answer.status >= 500:
            raise _TryAgain(f"it answered {answer.status}")
        if answer.status != 200:
            raise EnrolmentFailed(f"the gateway refused the enrolment secret of {agent_id} (HTTP {answer.status})")
    try:
        return key.open(EnrolResponse.model_validate_json(content).sealed, agent_id)
    except (HypercoreError, ValidationError):
        raise EnrolmentFailed("the gateway's answer to the enrolment does not open with this agent's key") from None
