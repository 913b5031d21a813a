"""The process backend fulfils the contract, with a user and control groups per agent and without both."""

from collections.abc import AsyncIterator

import pytest

from hypercore_agents.compute.testing.conformance import BackendConformance, Subject
from support.process_backend import ProcessSubject, no_limits, no_own_users


@pytest.mark.root
@pytest.mark.skipif(no_own_users() is not None, reason=str(no_own_users()))
class TestOwnUsersAndLimits(BackendConformance):
    @pytest.fixture
    async def subject(self) -> AsyncIterator[Subject]:
        subject = ProcessSubject(own_users=True, limits=no_limits() is None)
        yield subject
        await subject.close()


class TestSharedUserWithoutLimits(BackendConformance):
    @pytest.fixture
    async def subject(self) -> AsyncIterator[Subject]:
        subject = ProcessSubject()
        yield subject
        await subject.close()
