"""Times models of the Transformers library in its environment.

Mixtral and Qwen3-MoE of the sizes of configs/mixtral_nano.py and
configs/qwen3_nano.py, on batches of base.py's size, eager. The library computes
experts by `grouped_mm`, which was 2 to 140 times as fast as its alternatives.
Steps run in float32 and in bfloat16 autocast.
"""

import functools
import time

from serve import serve
import torch
import transformers

BATCH, TIME, VOCAB = 32, 128, 65
SIZES = dict(
  vocab_size=VOCAB,
  hidden_size=128,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=1,
  head_dim=32,
  max_position_embeddings=TIME,
  rms_norm_eps=1e-6,
  output_router_logits=True,
  use_cache=False,
)
MODELS = {
  'mixtral': lambda: transformers.MixtralForCausalLM(
    transformers.MixtralConfig(
      **SIZES,
      intermediate_size=344,
      num_local_experts=8,
      num_experts_per_tok=2,
    )
  ),
  'qwen3_moe': lambda: transformers.Qwen3MoeForCausalLM(
    transformers.Qwen3MoeConfig(
      **SIZES,
      moe_intermediate_size=168,
      num_experts=16,
      num_experts_per_tok=4,
      norm_topk_prob=True,
    )
  ),
}


def step(name: str, autocast: bool):
  torch.manual_seed(0)
  model = MODELS[name]()
  model.set_experts_implementation('grouped_mm')
  tokens = torch.randint(VOCAB, (BATCH, TIME))
  optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)

  def once() -> float:
    start = time.perf_counter()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
      loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start

  return lambda n: [once() for _ in range(n)]


if __name__ == '__main__':
  serve(
    {
      f'{name}{suffix}': functools.partial(step, name, autocast)
      for name in MODELS
      for suffix, autocast in (('', False), ('_bfloat16', True))
    }
  )
