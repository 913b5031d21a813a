"""The guest: pid 1 of a microVM, its control port, and the agent's server before it has an identity."""
