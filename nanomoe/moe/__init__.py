"""Mixture of experts: routers, dispatches, losses and statistics."""
