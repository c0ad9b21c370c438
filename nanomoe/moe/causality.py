"""Causality of a model: whether text can be generated from it."""

from nanomoe.config.overrides import Config
from nanomoe.moe.dispatch import registry
from nanomoe.moe.routers import ROUTERS
from trainers import spec


def objection(config: Config) -> str:
  """Returns why a model of this config generates no text, or '' if it does.

  The answer follows the label `causal` of the router and of the dispatch. A
  plug-in without the label counts as causal.
  """
  router, name = config.moe.router.type, config.moe.dispatch
  parts = {
    f'moe.router.type={router}': spec.resolve('moe.router', router, ROUTERS),
    f'moe.dispatch={name}': registry.DISPATCH[name],
  }
  culprits = [
    key for key, part in parts.items() if not getattr(part, 'causal', True)
  ]
  if not culprits:
    return ''
  return (
    f'{" and ".join(culprits)}: not causal; experts of a token depend on later '
    'tokens and on other sequences, which a text being generated does not have'
  )
