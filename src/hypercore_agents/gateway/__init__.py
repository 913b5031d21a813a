"""What sandboxes reach and nothing else: the keeper of the keys before the Claude API, and agents' internal routes."""
