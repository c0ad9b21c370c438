"""Processes that time steps when told to, and are idle otherwise."""
