"""What tests of the platform and of its backends share: a backend in memory, faults, and the conformance suite.

- `MemoryBackend`  keeps the contract without starting anything: for tests of the manager
- `FaultBackend`   wraps any backend and makes chosen operations slow, silent, failing, lying or forgetful
- `conformance`    the suite that every backend passes; it needs pytest, so it is imported by its own name
"""

from hypercore_agents.compute.testing.faults import Call, Fault, FaultBackend, FaultKind, Operation
from hypercore_agents.compute.testing.memory import MemoryBackend, MemoryHost

__all__ = ["Call", "Fault", "FaultBackend", "FaultKind", "MemoryBackend", "MemoryHost", "Operation"]
