"""What runs in a microVM before and around the agent's server: pid 1, its control port, the waiting server."""
