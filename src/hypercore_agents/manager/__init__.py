"""The manager: control plane and front door of the platform."""
