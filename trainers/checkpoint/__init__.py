"""Writing, reading and comparing checkpoints."""

from trainers.checkpoint.checkpointer import Checkpointer, SaveError

__all__ = ['Checkpointer', 'SaveError']
