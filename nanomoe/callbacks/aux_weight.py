"""The weight of the balance loss that the config has."""

import jax.numpy as jnp

from trainers.callbacks import Callback


class AuxWeight(Callback):
  """Sets model_state's `aux_weight` where the config's is another than before.

  Before: when the checkpoint was saved, after which it may have been raised by
  a callback. That stands, unless the config was changed since; and a run that
  starts from another's weights has its own.
  """

  def __init__(self, aux_weight: float):
    self.aux_weight = aux_weight
    self._before: float | None = None

  def on_fit_start(self, loop):
    if self._before == self.aux_weight:
      return
    own = {'aux_weight': jnp.float32(self.aux_weight)}

    def changed(state):
      return state.replace(model_state={**state.model_state, **own})

    loop.update_state(changed)

  def on_roll_back(self, loop):
    self.on_fit_start(loop)

  def state_dict(self):
    return {'aux_weight': self.aux_weight}

  def load_state_dict(self, state):
    self._before = state['aux_weight']
