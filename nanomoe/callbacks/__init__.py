"""Callbacks that know language models."""

from nanomoe.callbacks.aux_weight import AuxWeight
from nanomoe.callbacks.expert_loads import ExpertLoads, LoadHistory
from nanomoe.callbacks.routing_alarm import RoutingAlarm
from nanomoe.callbacks.run_files import Records
from nanomoe.callbacks.specialization import CoActivation, Specialization
from nanomoe.callbacks.text_sample import TextSample
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.task import LanguageModel
from trainers.callbacks import Callback

__all__ = [
  'AuxWeight',
  'CoActivation',
  'ExpertLoads',
  'LoadHistory',
  'Records',
  'RoutingAlarm',
  'Specialization',
  'TextSample',
  'pictures',
]


def pictures(task: LanguageModel, tokenizer: Tokenizer) -> list[Callback]:
  """Returns the callbacks that draw the routing of a model with experts.

  Args:
    task: Task of the run, which counts the experts of some tokens.
    tokenizer: Tokenizer of the run, which gives these tokens their texts.
  """
  names = [repr(tokenizer.decode([t])) for t in task.watched.tolist()]
  return [ExpertLoads(), LoadHistory(), Specialization(names), CoActivation()]
