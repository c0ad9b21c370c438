"""A model, put together as its config says."""

from collections.abc import Sequence
import functools
from typing import Any

from flax import linen as nn

from nanomoe.config.overrides import Config
from nanomoe.model.attention import Attention
from nanomoe.model.convolution import ShortConvolution
from nanomoe.model.heads import HEADS, softcap
from nanomoe.model.ngrams import Ngrams
from nanomoe.model.norms import NORMS, no_norm
from nanomoe.model.positions import POSITIONS
from nanomoe.model.transformer import Block, Transformer
from nanomoe.moe import experts as experts_lib
from nanomoe.moe.dispatch import registry
from nanomoe.moe.layer import FeedForward, MoE, RoutedAndShared
from nanomoe.moe.routers import ROUTERS, interface_problem
from nanomoe.task import LanguageModel
from trainers import spec
from trainers.errors import UserError


def build_task(
  config: Config,
  vocab_size: int,
  token_bytes: Sequence[bytes] | None = None,
  watched: Sequence[int] = (),
) -> LanguageModel:
  model, moe = config.model, config.moe
  router = functools.partial(
    spec.build,
    'moe.router',
    moe.router.to_dict(),
    ROUTERS,
    num_experts=moe.num_experts,
    top_k=moe.top_k,
    balance=moe.balance,
    vocab_size=vocab_size,
  )
  if problem := interface_problem(router()):
    raise UserError(f'moe.router.type={moe.router.type!r}: {problem}')
  norm = NORMS[model.norm]
  position = POSITIONS[model.position](config.block_size)
  zeros = {'out_init': nn.initializers.zeros_init()}
  out_init: dict[str, Any] = zeros if model.zero_outputs else {}
  attention = functools.partial(
    Attention,
    num_heads=model.num_heads,
    num_kv_heads=model.num_kv_heads or model.num_heads,
    norm=norm if model.qk_norm else no_norm,
    position=position,
    use_bias=model.bias,
    dropout_rate=model.dropout_rate,
    precision=config.precision,
    name='attention',
    **out_init,
  )

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

  dispatch = registry.build(moe.dispatch, moe.to_dict())
  eval_name = registry.eval_dispatch(config)
  sparse = functools.partial(
    MoE,
    router=functools.partial(router, name='router'),
    experts=experts(moe.num_experts, moe.d_ff),
    dispatch=dispatch,
    # The same function if it can be: it is then traced once for both.
    eval_dispatch=(
      dispatch
      if eval_name == moe.dispatch
      else registry.build(eval_name, moe.to_dict())
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
  blocks = [
    functools.partial(
      Block,
      norm=norm,
      convolution=functools.partial(ShortConvolution, model.conv_width),
      attention=attention,
      feed_forward=(
        sparse if i in with_experts else dense(moe.dense_d_ff, 'feed_forward')
      ),
      dropout_rate=model.dropout_rate,
    )
    for i in range(model.num_layers)
  ]
  transformer = Transformer(
    vocab_size=vocab_size,
    d_model=model.d_model,
    dropout_rate=model.dropout_rate,
    remat=model.remat,
    ngrams=functools.partial(
      Ngrams, vocab_size, model.d_model, model.max_ngram, model.ngram_rows
    ),
    position=position,
    blocks=blocks,
    norm=norm,
    head=functools.partial(
      HEADS[model.tie_embeddings],
      use_bias=model.bias,
      precision=config.precision,
    ),
    cap=functools.partial(softcap, cap=model.logit_softcap),
  )
  return LanguageModel(
    transformer,
    moe.aux_weight,
    moe.balance,
    token_bytes,
    z_weight=moe.z_weight,
    entropy_weight=moe.entropy_weight,
    confidence_weight=config.confidence_weight,
    bias_rate=getattr(router(), 'bias_rate', 0.0),
    watched=watched,
  )


def layers_with_experts(config: Config) -> list[int]:
  """After the first dense ones, each whose number, from 1, `every` divides."""
  first, every = config.moe.first_dense_layers, config.moe.every
  layers = range(first, config.model.num_layers)
  return [i for i in layers if (i + 1) % every == 0]
