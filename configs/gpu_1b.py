"""Mixture of 32 experts with 1.01 billion parameters, for large GPUs.

  python -m nanomoe.main --config=configs/gpu_1b.py --config.data.path=FILE

FILE is a UTF-8 text of tens of gigabytes, as in gpu_300m.py. A token uses 4 of
32 narrow experts, so 264 million parameters are active. The first layer is
dense and as wide as a token's experts together. A step has 32 sequences of
2,048 tokens. All else is as in gpu_300m.py.

Tests trace the step of this config. Nothing has trained it yet.

Measured: not yet.
"""

from ml_collections import ConfigDict

from configs import gpu_300m


def get_config() -> ConfigDict:
  config = gpu_300m.get_config()
  config.update(
    {
      'block_size': 2048,
      'model': {
        'd_model': 1024,
        'num_layers': 18,
        'num_heads': 16,
        'tie_embeddings': False,
      },
      'moe': {
        'num_experts': 32,
        'top_k': 4,
        'd_ff': 512,
        'first_dense_layers': 1,
        'dense_d_ff': 2048,  # 4 * 512
      },
      'optimizer': {'learning_rate': 4e-4},
    }
  )
  return config
