"""Every router, with the arguments that tests give it."""

import functools

import jax

from nanomoe.moe import experts
from nanomoe.moe.dispatch import registry
from nanomoe.moe.layer import MoE
from nanomoe.moe.routers import ROUTERS

# For programs that run once: optimizing them takes longer than it saves.
QUICKLY = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)

NUM_EXPERTS, TOP_K, VOCAB = 6, 2, 11

VARIANTS = {
  'TopK': ('TopK', {}),
  'Switch': ('Softmax', {'jitter': 0.2}),
  'Mixtral': ('Softmax', {'renormalize': True}),
  'Sigmoid': ('Sigmoid', {'bias_rate': 0.5}),
  'grouped': ('Sigmoid', {'num_groups': 3, 'groups_kept': 2}),
  'NoisyTopK': ('NoisyTopK', {}),
  'Hash': ('Hash', {'vocab_size': VOCAB}),
  'ExpertChoice': ('ExpertChoice', {}),
}
assert {name for name, _ in VARIANTS.values()} == set(ROUTERS)


def make(variant: str, balance: str = 'all_choices', **changes):
  """Returns the router of a variant, with changed arguments."""
  name, arguments = VARIANTS[variant]
  arguments = {**arguments, **changes}
  return ROUTERS[name](NUM_EXPERTS, TOP_K, balance, **arguments)


def layer(variant, dispatch, capacity_factor=NUM_EXPERTS, eval_dispatch=''):
  """Returns a layer of small experts; by default no expert is ever full."""
  keys = {'capacity_factor': float(capacity_factor)}
  return MoE(
    router=functools.partial(make, variant, name='router'),
    experts=functools.partial(
      experts.make,
      num_experts=NUM_EXPERTS,
      d_ff=7,
      activation='gelu',
      use_bias=True,
    ),
    dispatch=registry.build(dispatch, keys),
    eval_dispatch=registry.build(eval_dispatch or dispatch, keys),
    precision='float32',
  )
