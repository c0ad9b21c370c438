"""The transformer that a config describes.

This is the one place that reads the sections `model` and `moe`. It hands
factories down; no module asks a config what it is.
"""

import functools
from typing import Any

from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh

from nanomoe.config import layers
from nanomoe.config.schema import Config
from nanomoe.model.attention import ATTENTIONS, XAVIER
from nanomoe.model.convolution import ShortConvolution
from nanomoe.model.heads import HEADS, softcap
from nanomoe.model.interfaces import attention_problem
from nanomoe.model.ngrams import Ngrams
from nanomoe.model.norms import NORMS, no_norm
from nanomoe.model.positions import POSITIONS
from nanomoe.model.transformer import Block, Transformer
from nanomoe.moe import causality
from nanomoe.moe import experts as experts_lib
from nanomoe.moe.dispatch import registry
from nanomoe.moe.layer import FeedForward, MoE, RoutedAndShared
from nanomoe.moe.routers import ROUTERS, interface_problem
from nanomoe.ops import matmul
from trainers import spec
from trainers.errors import UserError
from trainers.mesh import row_constraint


def resolve_auto(config: Config) -> Config:
  """Returns a copy with 'auto' resolved, which a resumed run keeps."""
  config = config.copy_and_resolve_references()
  config.precision = matmul.resolve_precision(config.precision)
  moe = config.moe
  moe.dispatch = registry.resolve_dispatch(moe.dispatch)
  moe.eval_dispatch = registry.resolve_dispatch(moe.eval_dispatch)
  return config


def build_transformer(
  config: Config, vocab_size: int, mesh: Mesh | AbstractMesh | None = None
) -> Transformer:
  """Returns the transformer of a config.

  Args:
    config: Whole config, without 'auto'.
    vocab_size: Number of tokens in the vocabulary.
    mesh: Mesh of the run; None for one device.

  Raises:
    UserError: The router or the attention cannot be built, or the vocabulary
      has more tokens than `model.vocab_rows`.
  """
  model, moe = config.model, config.moe
  if 0 < model.vocab_rows < vocab_size:
    raise UserError(
      f'model.vocab_rows={model.vocab_rows}: the vocabulary has {vocab_size} '
      f'tokens; it must be 0 or at least {vocab_size}'
    )
  norm = NORMS[model.norm]
  zeros = nn.initializers.zeros_init()
  out_init: dict[str, Any] = {'out_init': zeros} if model.zero_outputs else {}

  def experts(num_experts: int, d_ff: int):
    return functools.partial(
      experts_lib.make,
      num_experts=num_experts,
      d_ff=d_ff,
      activation=moe.activation,
      use_bias=model.bias,
      **out_init,
    )

  def dense(d_ff: int, name: str):
    return functools.partial(
      FeedForward,
      experts=experts(1, d_ff),
      precision=config.precision,
      name=name,
    )

  dispatch = registry.build(moe.dispatch, moe.to_dict(), mesh)
  eval_name = registry.eval_dispatch(moe)
  sparse = functools.partial(
    MoE,
    router=functools.partial(build_router, config, vocab_size, name='router'),
    experts=experts(moe.num_experts, moe.d_ff),
    dispatch=dispatch,
    # The same function if it can be: it is then traced once for both.
    eval_dispatch=(
      dispatch
      if eval_name == moe.dispatch
      else registry.build(eval_name, moe.to_dict(), mesh)
    ),
    precision=config.precision,
    name='moe',
  )
  if moe.num_shared:
    shared = dense(moe.num_shared * moe.d_ff, 'shared')
    sparse = functools.partial(
      RoutedAndShared, routed=sparse, shared=shared, name='feed_forward'
    )
  with_experts = layers_with_experts(config)
  constrain = row_constraint(mesh)
  blocks = [
    functools.partial(
      Block,
      norm=norm,
      convolution=functools.partial(ShortConvolution, model.conv_width),
      attention=functools.partial(build_attention, config, name='attention'),
      feed_forward=(
        sparse if i in with_experts else dense(moe.dense_d_ff, 'feed_forward')
      ),
      dropout_rate=model.dropout_rate,
      constrain=constrain,
      remat_attention=model.remat == 'attention',
    )
    for i in range(model.num_layers)
  ]
  # Outside of any trace, so that a mistake in a spec is one line of text.
  build_router(config, vocab_size)
  build_attention(config)
  num_unrolled, period = (
    layers.repetition(model.num_layers, moe.first_dense_layers, moe.every)
    if model.scan_layers
    else (model.num_layers, 1)
  )
  return Transformer(
    vocab_size=model.vocab_rows or vocab_size,
    d_model=model.d_model,
    dropout_rate=model.dropout_rate,
    remat_blocks=model.remat == 'block',
    ngrams=functools.partial(
      Ngrams, vocab_size, model.d_model, model.max_ngram, model.ngram_rows
    ),
    position=POSITIONS[model.position](config.block_size),
    blocks=blocks,
    num_unrolled=num_unrolled,
    period=period,
    norm=norm,
    head=functools.partial(
      HEADS[model.tie_embeddings],
      use_bias=model.bias,
      precision=config.precision,
    ),
    cap=functools.partial(softcap, cap=model.logit_softcap),
    constrain=constrain,
  )


def build_router(config: Config, vocab_size: int, **names: str) -> nn.Module:
  """Returns the router of a config, a Linen module.

  Args:
    config: Whole config.
    vocab_size: Number of tokens in the vocabulary.
    **names: `name` of the module, if it is built inside another module.

  Raises:
    UserError: The router cannot be built, or has another interface.
  """
  moe = config.moe
  router: Any = spec.build(
    'moe.router',
    moe.router.to_dict(),
    ROUTERS,
    num_experts=moe.num_experts,
    top_k=moe.top_k,
    balance=moe.balance,
    vocab_size=vocab_size,
    **names,
  )
  if problem := interface_problem(router):
    raise UserError(f'moe.router.type={moe.router.type!r}: {problem}')
  return router


def build_attention(config: Config, **names: str) -> nn.Module:
  """Returns the attention of a config's blocks, a Linen module.

  Args:
    config: Whole config.
    **names: `name` of the module, if it is built inside another module.

  Raises:
    UserError: The attention cannot be built, or has another interface.
  """
  model = config.model
  zeros = nn.initializers.zeros_init()
  attention: Any = spec.build(
    'model.attention',
    model.attention.to_dict(),
    ATTENTIONS,
    num_heads=model.num_heads,
    num_kv_heads=model.num_kv_heads or model.num_heads,
    norm=NORMS[model.norm] if model.qk_norm else no_norm,
    position=POSITIONS[model.position](config.block_size),
    use_bias=model.bias,
    dropout_rate=model.dropout_rate,
    precision=config.precision,
    out_init=zeros if model.zero_outputs else XAVIER,
    **names,
  )
  if problem := attention_problem(attention):
    raise UserError(f'model.attention.type={model.attention.type!r}: {problem}')
  return attention


def layers_with_experts(config: Config) -> list[int]:
  """Returns the indices of the blocks whose feed-forward layer has experts.

  They follow `moe.first_dense_layers`, and their number, counted from 1, is a
  multiple of `moe.every`.
  """
  return layers.with_experts(
    config.model.num_layers, config.moe.first_dense_layers, config.moe.every
  )


def generation_problem(config: Config) -> str:
  """Returns why no text can be generated by a config's model, or ''.

  Text is generated token by token, by a causal model: one in which the output
  of a token depends on no later token and on no other sequence. The labels
  `causal` of the attention, the router and the dispatch decide. A plug-in
  without the label counts as causal.
  """
  name = config.model.attention.type
  attention = spec.resolve('model.attention', name, ATTENTIONS)
  problems = [causality.objection(config)]
  if not getattr(attention, 'causal', True):
    problems.append(
      f'model.attention.type={name}: not causal, since tokens attend to later '
      'tokens'
    )
  return '; '.join(filter(None, problems))


def accumulation_problem(config: Config, router: nn.Module) -> str:
  """Returns why gradients of a config's model cannot be accumulated, or ''.

  Micro-batches must route as their batch does. The property `separable` of the
  router and the label `causal` of the dispatch decide. A plug-in router without
  `separable` counts as separable.

  Args:
    config: Whole config, without 'auto'.
    router: Router of the config, as built by `build_router`.
  """
  moe = config.moe
  if config.accumulate_steps == 1 or not layers_with_experts(config):
    return ''
  problems = []
  if not getattr(router, 'separable', True):
    problems.append(
      f'moe.router={moe.router.to_dict()} routes with noise or across sequences'
    )
  if not registry.DISPATCH[moe.dispatch].causal:
    problems.append(
      f'moe.dispatch={moe.dispatch!r} drops tokens by the load of all tokens'
    )
  if not problems:
    return ''
  return (
    f'accumulate_steps={config.accumulate_steps}: {" and ".join(problems)}, so '
    'that micro-batches would differ from their batch; with it, '
    'accumulate_steps must be 1'
  )
