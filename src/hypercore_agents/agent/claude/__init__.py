"""The Claude CLI: its options and environment, its start, its prewarmed processes, and its messages."""
