"""Thin routes, authentication and the front door of the manager."""
