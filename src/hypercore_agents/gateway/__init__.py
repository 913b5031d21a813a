"""The gateway: the only service that sandboxes reach. It holds Claude API keys and serves agents' internal routes."""
