"""Callbacks that know language models."""

from nanomoe.callbacks.aux_weight import AuxWeight
from nanomoe.callbacks.expert_loads import ExpertLoads
from nanomoe.callbacks.records import Records
from nanomoe.callbacks.text_sample import TextSample

__all__ = ['AuxWeight', 'ExpertLoads', 'Records', 'TextSample']
