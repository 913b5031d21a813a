"""The agent server, which runs in a sandbox and drives the Claude Agent SDK."""
