"""Callbacks: periodic actions, and actions at the start and end of a run."""

from trainers.callbacks.callback import Callback
from trainers.callbacks.checkpoints import Checkpoints
from trainers.callbacks.early_stopping import EarlyStopping
from trainers.callbacks.evaluation import Evaluation
from trainers.callbacks.overview import ParameterOverview
from trainers.callbacks.profile import Profile
from trainers.callbacks.progress import Progress
from trainers.callbacks.refused_updates import RefusedUpdates
from trainers.callbacks.result import Result

__all__ = [
  'Callback',
  'Checkpoints',
  'EarlyStopping',
  'Evaluation',
  'ParameterOverview',
  'Profile',
  'Progress',
  'RefusedUpdates',
  'Result',
]
