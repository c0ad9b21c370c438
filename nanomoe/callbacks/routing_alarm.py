"""Alarm on dead and overloaded experts, with an optional action."""

import logging
from typing import Any

import jax.numpy as jnp
import numpy as np

from trainers.callbacks import Callback

log = logging.getLogger(__name__)

ACTIONS = ('warn', 'raise', 'stop')
# Default limit of MaxVio, as a share of its maximum: nearly all tokens share
# an expert.
SHARE_OF_WORST = 0.9
NUM_NAMED = 8  # Alarms in one line; a collapse may cause hundreds.


class RoutingAlarm(Callback):
  """Callback that warns of dead and overloaded experts and may act on them.

  Each log covers a window of steps. An alarm starts if an expert had no token
  in all windows of the last `dead_steps` steps, or if a layer's MaxVio in a
  window exceeded its limit. The alarm ends with the first window in which that
  no longer holds. Each log gets the metric 'routing_alarms', the number of
  alarms. Layers are layers with experts, counted from 0.

  The action is taken when an alarm starts, and every `dead_steps` steps while
  an alarm lasts: an earlier action needs time to take effect. It is taken after
  the step that follows the log, so that an interrupted run acts at the same
  step as an uninterrupted one.

  Args:
    num_experts: Number of experts of a layer.
    top_k: Number of experts of a token.
    action: 'warn' logs alone; 'raise' also raises the weight of the balance
      loss; 'stop' also ends the run with the status 'collapsed'.
    dead_steps: Steps without a token after which an expert is dead, >= 1,
      counted in whole windows. Also the steps between two actions.
    max_vio: Limit of MaxVio, >= 0. None stands for nine tenths of the maximum,
      num_experts / top_k - 1.
    factor: Factor of the weight at each raise, > 1.
    min_weight: Lowest weight after a raise, > 0: the weight may have been 0.
    max_weight: Highest weight after a raise.
  """

  def __init__(
    self,
    num_experts: int,
    top_k: int,
    action: str = 'warn',
    dead_steps: int = 500,
    max_vio: float | None = None,
    factor: float = 2.0,
    min_weight: float = 0.01,
    max_weight: float = 1.0,
  ):
    """Raises ValueError if an argument is out of its range."""
    if action not in ACTIONS:
      raise ValueError(f'{action=} must be one of {", ".join(ACTIONS)}')
    if dead_steps < 1:
      raise ValueError(f'{dead_steps=} must be >= 1')
    if max_vio is not None and max_vio < 0:
      raise ValueError(f'{max_vio=} must be >= 0')
    if factor <= 1:
      raise ValueError(f'{factor=} must be > 1')
    if not 0 < min_weight <= max_weight:
      raise ValueError(f'{min_weight=} must be > 0 and <= {max_weight=}')
    self.action = action
    self.dead_steps = dead_steps
    if max_vio is None:
      max_vio = SHARE_OF_WORST * (num_experts / top_k - 1)
    self.max_vio = max_vio
    self.factor = factor
    self.min_weight, self.max_weight = min_weight, max_weight
    self.since: dict[str, int] = {}  # Problem: the last step without it.
    self.alarms: list[str] = []  # Problems that have lasted too long.
    self._logged = -1  # Step of the last log; -1 before the first.
    self._acted: int | None = None  # Step of the log of the last action.
    self._due: int | None = None  # Step of the log of the pending action.
    self._reason = ''  # Description of the alarms of that log.
    self._stopped = False

  def on_fit_start(self, loop):
    """Stops a run that this alarm has stopped before."""
    if self._logged < 0:
      self._logged = loop.step
    if self._stopped:
      loop.stop(self._reason, 'collapsed')

  def on_log(self, loop, metrics):
    """Updates and logs the alarms, and schedules an action."""
    if 'train/expert_load' not in metrics:  # No layer has experts.
      return
    step, old_alarms = loop.step, set(self.alarms)
    problems = self._find_problems(metrics)
    self.since = {p: self.since.get(p, self._logged) for p in problems}
    self._logged = step
    self.alarms = [
      problem
      for problem, tolerated_steps in problems.items()
      if step - self.since[problem] >= tolerated_steps
    ]
    metrics['routing_alarms'] = len(self.alarms)
    if new := [alarm for alarm in self.alarms if alarm not in old_alarms]:
      text = f'step {step}: routing alarm: {self._describe(new)}'
      log.warning('%s', text)
      loop.writer.write_texts(step, {'routing_alarm': text})
    elif old_alarms and not self.alarms:
      log.info('step %d: all routing alarms have ended', step)
    may_act = self._acted is None or step - self._acted >= self.dead_steps
    if self.alarms and may_act and self.action != 'warn':
      self._acted = self._due = step
      self._reason = self._describe(self.alarms)

  def _find_problems(self, metrics: dict[str, Any]) -> dict[str, int]:
    """Returns the problems of a window, each with the steps it is tolerated."""
    dead = np.argwhere(np.asarray(metrics['train/expert_load']) == 0)
    crowded = np.asarray(metrics['train/max_vio']) > self.max_vio
    return {
      **{f'layer {i}, expert {e}: no token': self.dead_steps for i, e in dead},
      **{
        f'layer {i}: MaxVio above {self.max_vio:.4g}': 0
        for i in np.flatnonzero(crowded)
      },
    }

  def _describe(self, alarms: list[str]) -> str:
    """Returns one line with the first NUM_NAMED alarms and when they began."""
    named = [f'{alarm} since step {self.since[alarm]}' for alarm in alarms]
    num_more = len(named) - NUM_NAMED
    named[NUM_NAMED:] = [f'and {num_more} more'] if num_more > 0 else []
    return '; '.join(named)

  def on_train_step_end(self, loop):
    """Takes the action that the last log scheduled."""
    # A log may arrive before or after the next step has begun. After that
    # step's hooks, it always has.
    if self._due is None or self._due >= loop.step:
      return
    self._due = None
    if self.action == 'stop':
      self._stopped = True
      loop.stop(self._reason, 'collapsed')
    else:
      self._raise_weight(loop)

  def _raise_weight(self, loop) -> None:
    """Raises the weight of the balance loss in model_state and logs it."""
    old = float(loop.state.model_state['aux_weight'])
    new = min(max(old * self.factor, self.min_weight), self.max_weight)
    if new <= old:
      log.warning(
        'step %d: weight of the balance loss stays %.4g; max_weight is %.4g',
        *(loop.step, old, self.max_weight),
      )
      return
    change = {'aux_weight': jnp.float32(new)}
    loop.update_state(
      lambda s: s.replace(model_state={**s.model_state, **change})
    )
    text = (
      f'step {loop.step}: weight of the balance loss raised from {old:.4g} to '
      f'{new:.4g}'
    )
    log.warning('%s', text)
    loop.writer.write_texts(loop.step, {'routing_alarm': text})

  def state_dict(self):
    """Returns the problems, the alarms and the state of the action."""
    return {
      'action': self.action,
      'since': self.since,
      'alarms': self.alarms,
      'logged': self._logged,
      'acted': self._acted,
      'due': self._due,
      'reason': self._reason,
      'stopped': self._stopped,
    }

  def load_state_dict(self, state):
    """Restores the result of `state_dict`.

    The state of the action is restored only if the config's action is the same.
    """
    self.since, self.alarms = state['since'], state['alarms']
    self._logged = state['logged']
    if state['action'] == self.action:
      self._acted, self._due = state['acted'], state['due']
      self._reason, self._stopped = state['reason'], state['stopped']
