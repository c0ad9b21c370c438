"""Whether text can be generated: what a token's experts depend on."""

from nanomoe.config.schema import Config
from nanomoe.moe.dispatch import registry
from nanomoe.moe.routers import ROUTERS
from trainers import spec


def objection(config: Config) -> str:
  """Why a model of this config generates no text; '' if it does.

  By the labels of its router and its dispatch; one without is taken for causal.
  """
  router, name = config.moe.router.type, config.moe.dispatch
  parts = {
    f'moe.router.type={router}': spec.resolve('moe.router', router, ROUTERS),
    f'moe.dispatch={name}': registry.DISPATCH[name],
  }
  blamed = [k for k, part in parts.items() if not getattr(part, 'causal', True)]
  if not blamed:
    return ''
  return (
    f'not causal: {" and ".join(blamed)}; what a token gets depends on later '
    'tokens and on other sequences, which text that is being generated does '
    'not have'
  )
