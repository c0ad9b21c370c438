"""Checkpoints: written, read and compared."""

from trainers.checkpoint.checkpointer import Checkpointer, SaveError

__all__ = ['Checkpointer', 'SaveError']
