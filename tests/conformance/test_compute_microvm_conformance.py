"""The microvm backend fulfils the contract, with real VMs cloned from a template."""

from collections.abc import AsyncIterator

import pytest

from hypercore_agents.compute.testing.conformance import BackendConformance, Subject
from support.microvm_backend import MicrovmSubject, Place


class TestMicrovms(BackendConformance):
    @pytest.fixture
    async def subject(self, microvm_place: Place) -> AsyncIterator[Subject]:
        subject = MicrovmSubject(microvm_place)
        yield subject
        await subject.backend.close()
