"""Mixture of 8 experts with 298 million parameters, for a GPU.

  python -m nanomoe.main --config=configs/gpu_300m.py --config.data.path=FILE

FILE is a UTF-8 text of some gigabytes. A BPE of up to 50,257 tokens is learned
from it, and the vocabulary is padded to 50,304 rows. A token uses 2 of 8
experts, so 118 million parameters are active. A step has 32 sequences of 1,024
tokens.

The model uses RMSNorm, also of queries and keys, RoPE, SwiGLU, grouped queries
and tied embeddings. Layers are scanned, blocks are recomputed in the backward
pass, and logits exist for 128 tokens of each sequence at a time.

Tests trace the step of this config. Nothing has trained it yet.

Measured: not yet.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.update(
    {
      'num_train_steps': 100_000,
      'batch_size': 32,
      'block_size': 1024,
      'eval_interval': 1000,
      'eval_iters': 50,
      'precision': 'bfloat16',
      'data': {'tokenizer': {'type': 'BPE', 'vocab_size': 50_257}},
      'model': {
        'd_model': 768,
        'vocab_rows': 50_304,  # 393 * 128
        'num_layers': 12,
        'num_heads': 12,
        'num_kv_heads': 4,
        'dropout_rate': 0.0,
        'scan_layers': True,
        'logits_chunk': 128,
        'remat': 'block',
        'norm': 'RMSNorm',
        'position': 'rope',
        'qk_norm': True,
        'bias': False,
        'tie_embeddings': True,
      },
      'moe': {
        'num_experts': 8,
        'top_k': 2,
        'd_ff': 1088,
        'activation': 'swiglu',
        'router': {'type': 'Softmax', 'renormalize': True},
        'balance': 'all_choices',
        'z_weight': 1e-3,
      },
      'optimizer': {
        'learning_rate': 6e-4,
        'beta2': 0.95,
        'schedule': {'type': 'warmup_cosine', 'warmup_steps': 2000},
        'clip_norm': 1.0,
        'decay_mask': 'matrices',
      },
      'sample': {'every_steps': 5000},
    }
  )
  return config
