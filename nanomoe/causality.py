"""Whether text can be generated: what a token's experts depend on."""

from flax import linen as nn

from nanomoe import dispatch as dispatch_lib


def objection(router: nn.Module, dispatch: str) -> str:
  """Why a model of these generates no text; '' if it does.

  One without a label is taken for causal, as are routers of others' making.
  """
  labels = {
    f'moe.router.type={type(router).__name__}': router,
    f'moe.dispatch={dispatch}': dispatch_lib.DISPATCH[dispatch],
  }
  blamed = [
    name for name, part in labels.items() if not getattr(part, 'causal', True)
  ]
  if not blamed:
    return ''
  return (
    f'{" and ".join(blamed)} is not causal: what a token gets depends on later '
    'tokens and on other sequences, which a text that is being generated does '
    'not have'
  )
