"""The streaming HTTP relay: connections to upstreams and their pool, header rules, time limits, the relay itself."""
