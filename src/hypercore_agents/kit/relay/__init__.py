"""The streaming HTTP relay: client connections and their pool, header rules, time limits, and the relay itself."""
