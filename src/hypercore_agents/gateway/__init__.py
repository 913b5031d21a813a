"""What a sandbox can reach: the way to the Claude API, and the agents' internal routes."""
