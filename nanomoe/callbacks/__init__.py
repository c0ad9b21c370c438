"""Callbacks that know language models."""

from nanomoe.callbacks.expert_loads import ExpertLoads
from nanomoe.callbacks.text_sample import TextSample

__all__ = ['ExpertLoads', 'TextSample']
