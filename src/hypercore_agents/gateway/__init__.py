"""What sandboxes reach and nothing else: the keeper of the keys on the way to the Claude API, and agents' internal routes."""
