"""Import of a model: its weights as the initial state of a run."""

from collections.abc import Callable
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from nanomoe.config.schema import Config
from nanomoe.model import stack
from nanomoe.portable import model
from trainers.callbacks.callback import Callback


class StopAtStart(Callback):
  """Callback that evaluates step 0 and stops the run, which is then saved."""

  def on_fit_start(self, loop):
    loop.evaluate('val')
    loop.stop('the run was imported')


def without_zero_shared(path: pathlib.Path, config: Config) -> Config:
  """Returns a config without its shared expert if that expert is zero.

  Args:
    path: Directory of the model.
    config: Config of the model.

  Raises:
    UserError: The files are damaged.
  """
  if config.moe.num_shared == 1 and model.has_zero_shared(path, config):
    config = config.copy_and_resolve_references()
    config.moe.num_shared = 0
  return config


def initial(path: pathlib.Path, config: Config) -> Callable[[Any, Any], Any]:
  """Returns a function from shapes of params and model_state to their values.

  Args:
    path: Directory of the model.
    config: Config of the run.
  """

  def read(params: Any, model_state: Any) -> tuple[Any, Any]:
    if stack.STACKED in params:
      params = jax.eval_shape(stack.unstack, params)
    found = model.read(
      path, model.unrolled(config), params, 'bias' in model_state
    )
    state = {'aux_weight': jnp.float32(config.moe.aux_weight)}
    if found.bias is not None:
      state['bias'] = jnp.asarray(found.bias)
    params = jax.tree.map(jnp.asarray, found.params)
    return model.restacked(params, config), state

  return read
