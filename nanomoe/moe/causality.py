"""Causality of a model: whether text can be generated from it."""

from nanomoe.config.overrides import Config
from nanomoe.moe.dispatch import registry
from nanomoe.moe.routers import ROUTERS
from trainers import spec


def objection(config: Config) -> str:
  """Returns why a model of this config generates no text, or '' if it does.

  The answer follows the label `causal` of the router and of the dispatch that
  evaluation and generation use. A plug-in without the label counts as causal.
  """
  router, name = config.moe.router.type, registry.eval_dispatch(config)
  key = 'moe.eval_dispatch' if config.moe.eval_dispatch else 'moe.dispatch'
  culprits = []
  router_type = spec.resolve('moe.router', router, ROUTERS)
  if not getattr(router_type, 'causal', True):
    culprits.append(f'moe.router.type={router}')
  if not registry.DISPATCH[name].causal:
    culprits.append(f'{key}={name}')
  if not culprits:
    return ''
  hint = (
    ''
    if any('router' in culprit for culprit in culprits)
    else "; generation needs a causal moe.eval_dispatch, such as 'dropless'"
  )
  return (
    f'{" and ".join(culprits)}: not causal, since the experts of a token '
    f'depend on later tokens and on other sequences{hint}'
  )
