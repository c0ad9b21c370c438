"""Dispatches: ways to send tokens to their experts."""
