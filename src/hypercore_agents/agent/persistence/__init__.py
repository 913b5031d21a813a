"""State of sessions outside the agent: transcript, event journal, and workspace archive."""
