"""Routes, authentication and front door of the manager; the logic is in `fleet` and `sessions`."""
