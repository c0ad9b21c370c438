"""Runs a small model of transformers, of random weights; saves what it did.

python dump_transformers.py mixtral|qwen3_moe OUT.npz

Beside the weights and the logits, what enters and leaves attention, and the
feed-forward network, of each layer.
"""

import sys

import numpy as np
import torch
import transformers

SIZES = dict(
  vocab_size=61,
  hidden_size=32,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  num_experts_per_tok=2,
  rms_norm_eps=1e-6,
  max_position_embeddings=64,
  rope_parameters={'rope_type': 'default', 'rope_theta': 10_000.0},
)
MODELS = {
  'mixtral': lambda: transformers.MixtralForCausalLM(
    transformers.MixtralConfig(
      **SIZES, intermediate_size=48, num_local_experts=4
    )
  ),
  # The first layer and the third are dense; embeddings are tied.
  'qwen3_moe': lambda: transformers.Qwen3MoeForCausalLM(
    transformers.Qwen3MoeConfig(
      **SIZES,
      head_dim=8,
      intermediate_size=40,
      moe_intermediate_size=48,
      num_experts=4,
      norm_topk_prob=True,
      decoder_sparse_step=2,
      tie_word_embeddings=True,
    )
  ),
}


def main(name: str, out: str) -> None:
  torch.manual_seed(0)
  model = MODELS[name]().eval()
  found = {}

  def keep(key):
    def hook(module, args, kwargs, output):
      x = args[0] if args else kwargs['hidden_states']
      y = output[0] if isinstance(output, tuple) else output
      found[f'{key}.x'], found[f'{key}.y'] = x.numpy(), y.numpy()

    return hook

  for i, layer in enumerate(model.model.layers):
    for part in ('self_attn', 'mlp'):
      hook = keep(f'model.layers.{i}.{part}')
      getattr(layer, part).register_forward_hook(hook, with_kwargs=True)
  tokens = torch.randint(0, SIZES['vocab_size'], (2, 24))
  with torch.no_grad():
    for parameter in model.parameters():  # Far from linear; no scale is 1.
      width = parameter.shape[-1] if parameter.ndim > 1 else 16
      parameter.add_(1.5 * width**-0.5 * torch.randn_like(parameter))
    logits = model(tokens).logits
  weights = {k: v.numpy() for k, v in model.state_dict().items()}
  np.savez(out, tokens=tokens, logits=logits, **weights, **found)


if __name__ == '__main__':
  main(*sys.argv[1:])
