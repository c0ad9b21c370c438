"""Callbacks that know language models."""

from nanomoe.callbacks.text_sample import TextSample

__all__ = ['TextSample']
