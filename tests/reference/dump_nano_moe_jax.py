"""Runs nano-moe-jax in an environment of its own; saves what it computed.

python dump_nano_moe_jax.py OUT.npz
"""

import sys

import jax
from nano_moe import NanoMoE, NanoMoEConfig
import numpy as np

config = NanoMoEConfig(vocab_size=65)
model = NanoMoE(config)
tokens = np.random.default_rng(0).integers(0, 65, (4, 128))
params = model.init(jax.random.key(1), tokens, deterministic=True)['params']
# As after training: no bias is 0, no scale is 1.
keys = iter(jax.random.split(jax.random.key(2), 1000))
params = jax.tree.map(
  lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), params
)
logits, aux_loss = model.apply({'params': params}, tokens, deterministic=True)
flat = {
  jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params)
}
np.savez(sys.argv[1], tokens=tokens, logits=logits, aux_loss=aux_loss, **flat)
