"""The control plane and front door."""
