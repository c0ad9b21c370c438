"""Keeps the balance loss's weight in agreement with the config."""

import jax.numpy as jnp

from trainers.callbacks import Callback


class AuxWeight(Callback):
  """Callback that sets model_state's `aux_weight` if the config changed it.

  A checkpoint restores a weight that a callback raised in training. The
  restored weight stands unless the config's weight differs from the one that
  the checkpoint was saved with. A run that starts from another run's weights
  gets the weight of its own config.

  Args:
    aux_weight: Weight of the balance loss in the config.
  """

  def __init__(self, aux_weight: float):
    self.aux_weight = aux_weight
    self._saved: float | None = None  # The config's, at the last checkpoint.

  def on_fit_start(self, loop):
    """Sets the weight if the config's weight has changed."""
    if self._saved == self.aux_weight:
      return
    change = {'aux_weight': jnp.float32(self.aux_weight)}

    def with_weight(state):
      return state.replace(model_state={**state.model_state, **change})

    loop.update_state(with_weight)

  def on_roll_back(self, loop):
    """Sets the weight again, because the checkpoint restored another."""
    self.on_fit_start(loop)

  def state_dict(self):
    """Returns the config's weight."""
    return {'aux_weight': self.aux_weight}

  def load_state_dict(self, state):
    """Restores the weight that the config had at the checkpoint."""
    self._saved = state['aux_weight']
