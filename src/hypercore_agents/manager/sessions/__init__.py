"""Sessions: placement on agents, and the relay of their turns."""
