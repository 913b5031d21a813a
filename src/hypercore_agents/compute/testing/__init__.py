"""Support for tests of the platform and its backends: a backend in memory, injected faults, the conformance suite.

- `MemoryBackend`  implements the contract without starting anything: for tests of the manager
- `FaultBackend`   wraps any backend and makes chosen operations slow, hang, fail, or give wrong or incomplete answers
- `conformance`    the suite that every backend passes; it needs pytest, so import it by its own name
"""

from hypercore_agents.compute.testing.faults import Call, Fault, FaultBackend, FaultKind, Operation
from hypercore_agents.compute.testing.memory import MemoryBackend, MemoryHost

__all__ = ["Call", "Fault", "FaultBackend", "FaultKind", "MemoryBackend", "MemoryHost", "Operation"]
