"""Figures of one autoscaling rule on one load trace, for `autoscaler_sim.py` and its plots."""

from dataclasses import dataclass, field


@dataclass
class RuleRun:
    """How one rule sized the pool on one trace. `running` has the number of running agents per second."""

    trace: str
    spawn: int
    rule: str
    unserved: float = 0.0
    agent_seconds: int = 0
    flaps: int = 0
    reference_seconds: int = 0
    running: list[int] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Agent-hours over the reference's."""
        return self.agent_seconds / self.reference_seconds
