"""Switch Transformer (Fedus et al. 2021), at nano scale: one expert a token.

  python -m nanomoe.main --config=configs/switch.py

As there: every other layer has experts, each as wide as the dense layers
between; the weight is the probability itself; inputs of the router jitter by
0.01; experts have 1.25 times an even load of rows and drop the rest; the
balance loss weighs 0.01 in each layer; RMSNorm, no biases. Not as there:
a decoder alone, positions learned and not relative, GELU for ReLU.

Not causal: which tokens are dropped depends on the whole batch. So it generates
no text, unless --config.moe.eval_dispatch=dropless lets evaluation and
generation drop nothing. The loss below is that of the dispatch of training.

Measured: val cross-entropy 2.0241, 1000 steps in 7 minutes on 2 cores.
"""

from ml_collections import ConfigDict

from configs import short


def get_config() -> ConfigDict:
  config = short.get_config()
  config.update(
    {
      'model': {'norm': 'RMSNorm', 'bias': False},
      'moe': {
        'every': 2,
        'num_experts': 8,
        'top_k': 1,
        'd_ff': 1024,  # As dense_d_ff.
        'dispatch': 'capacity',
        'router': {'type': 'Softmax', 'jitter': 0.01},
      },
    }
  )
  return config
