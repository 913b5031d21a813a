"""The Claude CLI: its options, environment, start, prewarmed processes and messages."""
