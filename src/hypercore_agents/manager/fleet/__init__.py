"""Agents: their lifecycle, the pool, and the reconciler that moves observed state toward desired state."""
