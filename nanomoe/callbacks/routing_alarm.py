"""Experts that nobody chooses, or everybody: told, and acted upon."""

import logging
from typing import Any

import jax.numpy as jnp
import numpy as np

from trainers.callbacks import Callback

log = logging.getLogger(__name__)

ACTIONS = ('warn', 'raise', 'stop')
# Of the largest MaxVio that there can be: nearly all tokens share an expert.
SHARE_OF_WORST = 0.9
NUM_NAMED = 8  # Alarms in one line, which a collapse may raise for hundreds.


class RoutingAlarm(Callback):
  """Tells of dead experts and of crowded ones, and acts, as `action` says.

  An alarm begins with the log of a window in which an expert had no token, as
  in all windows of the last `dead_steps` steps, or in which a layer's MaxVio
  was above its limit; and it ends with the first that is otherwise. Adds
  'routing_alarms', how many there are, to each log. Layers are those with
  experts, counted from 0.

  What is to be done is done when an alarm begins, and every `dead_steps` steps
  while there is one, never sooner: what was done needs time. It is done after
  the step that follows the log's, whatever else happens between the two, so
  that a run which is interrupted goes on as it would have.

  Args:
    num_experts, top_k: of a layer, and of a token.
    action: 'warn' does no more than tell; 'raise' also raises the weight of the
      balance loss; 'stop' also ends the run, as collapsed.
    dead_steps: how long an expert had no token; counted in whole windows.
    max_vio: the limit; None: nine tenths of num_experts / top_k - 1, which it
      is if all tokens share an expert.
    factor: what the weight is multiplied with.
    min_weight: what it is raised to, at least: it may have been 0.
    max_weight: what it is not raised above.
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
    self.since: dict[str, int] = {}  # What is wrong: the last step before it.
    self.alarms: list[str] = []  # Those of them that are wrong for too long.
    self._logged = -1  # The step of the last log; none yet.
    self._acted: int | None = None  # The log that was acted upon last.
    self._due: int | None = None  # The log that is still to be acted upon.
    self._reason = ''  # What was wrong then.
    self._stopped = False

  def on_fit_start(self, loop):
    if self._logged < 0:
      self._logged = loop.step
    if self._stopped:
      loop.stop(self._reason, 'collapsed')

  def on_log(self, loop, metrics):
    if 'train/expert_load' not in metrics:  # No layer has experts.
      return
    step, before = loop.step, set(self.alarms)
    needed = self._wrong(metrics)
    self.since = {what: self.since.get(what, self._logged) for what in needed}
    self._logged = step
    self.alarms = [
      what for what, steps in needed.items() if step - self.since[what] >= steps
    ]
    metrics['routing_alarms'] = len(self.alarms)
    if new := [what for what in self.alarms if what not in before]:
      text = f'step {step}: routing alarm: {self._told(new)}'
      log.warning('%s', text)
      loop.writer.write_texts(step, {'routing_alarm': text})
    elif before and not self.alarms:
      log.info('step %d: no routing alarm any more', step)
    rested = self._acted is None or step - self._acted >= self.dead_steps
    if self.alarms and rested and self.action != 'warn':
      self._acted = self._due = step
      self._reason = self._told(self.alarms)

  def _wrong(self, metrics: dict[str, Any]) -> dict[str, int]:
    """{what is wrong in this window: for how many steps it may be}."""
    dead = np.argwhere(np.asarray(metrics['train/expert_load']) == 0)
    crowded = np.asarray(metrics['train/max_vio']) > self.max_vio
    return {
      **{f'layer {i}, expert {e}: no token': self.dead_steps for i, e in dead},
      **{
        f'layer {i}: MaxVio above {self.max_vio:.4g}': 0
        for i in np.flatnonzero(crowded)
      },
    }

  def _told(self, alarms: list[str]) -> str:
    named = [f'{what} since step {self.since[what]}' for what in alarms]
    rest = len(named) - NUM_NAMED
    named[NUM_NAMED:] = [f'and {rest} more'] if rest > 0 else []
    return '; '.join(named)

  def on_train_step_end(self, loop):
    # The state may be one step ahead when a log comes, or it may not.
    if self._due is None or self._due >= loop.step:
      return
    self._due = None
    if self.action == 'stop':
      self._stopped = True
      loop.stop(self._reason, 'collapsed')
    else:
      self._raise(loop)

  def _raise(self, loop) -> None:
    old = float(loop.state.model_state['aux_weight'])
    new = min(max(old * self.factor, self.min_weight), self.max_weight)
    if new <= old:
      log.warning(
        "step %d: the balance loss's weight stays %.4g: max_weight is %.4g",
        *(loop.step, old, self.max_weight),
      )
      return
    own = {'aux_weight': jnp.float32(new)}
    loop.update_state(lambda s: s.replace(model_state={**s.model_state, **own}))
    text = (
      f"step {loop.step}: the balance loss's weight is raised from {old:.4g} "
      f'to {new:.4g}'
    )
    log.warning('%s', text)
    loop.writer.write_texts(loop.step, {'routing_alarm': text})

  def state_dict(self):
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
    self.since, self.alarms = state['since'], state['alarms']
    self._logged = state['logged']
    if state['action'] == self.action:  # Another one begins anew.
      self._acted, self._due = state['acted'], state['due']
      self._reason, self._stopped = state['reason'], state['stopped']
