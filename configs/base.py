"""The documented model on Tiny Shakespeare: 4 experts, two per character.

  python -m nanomoe.main --config=configs/base.py

2,409,025 parameters (65 characters), 1,355,329 of them used per character.

Measured: val cross-entropy 1.6118, 5000 steps in 27 minutes on 2 cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.num_train_steps = 5000
  config.batch_size = 32
  config.block_size = 128  # Characters that attention looks back on, at most.
  config.eval_interval = 250  # Steps. Checkpoints have the same period.
  config.eval_iters = 200  # Batches; 0: every target of the split, once.
  config.eval_weights = 'params'  # average: of optimizer.ema_decay.
  config.log_interval = 50
  config.confidence_weight = 0.0  # Of predictions' negative entropy.
  # Of matrix products' operands; sums are float32. auto: what this machine
  # computes fastest.
  config.precision = 'auto'
  config.init_from = ''  # A run whose weights this one starts from.

  config.data = ConfigDict()
  config.data.path = ''  # A UTF-8 text; '': Tiny Shakespeare.
  config.data.fallback = 'pydoc_data.topics'  # Without a network; '': an error.
  config.data.tokenizer = ConfigDict({'type': 'Characters'})
  config.data.dataset = ConfigDict({'type': 'Windows'})

  config.model = ConfigDict()
  config.model.d_model = 128
  config.model.num_layers = 4
  config.model.num_heads = 4
  config.model.dropout_rate = 0.1
  config.model.remat = False  # True: less memory, a third more work.
  config.model.attention = ConfigDict({'type': 'CausalSelfAttention'})
  config.model.norm = 'LayerNorm'
  config.model.position = 'learned'
  config.model.conv_width = 1  # Inputs that a layer's are mixed of; 1: none.
  config.model.max_ngram = 1  # Tokens with an embedding together; 1: none.
  config.model.ngram_rows = 8192  # Of a table of n-grams, at most.
  config.model.num_kv_heads = 0  # As many as num_heads.
  config.model.qk_norm = False
  config.model.bias = True
  config.model.zero_outputs = False  # Of blocks, at the start.
  config.model.tie_embeddings = False
  config.model.logit_softcap = 0.0  # 0: none.

  config.moe = ConfigDict()
  config.moe.num_experts = 4
  config.moe.top_k = 2
  config.moe.d_ff = 512
  config.moe.activation = 'gelu'
  config.moe.num_shared = 0  # Experts that every token has, beside top_k.
  config.moe.first_dense_layers = 0
  config.moe.every = 1  # 2: every other layer has experts.
  config.moe.dense_d_ff = 1024  # Of layers without experts.
  config.moe.dispatch = 'auto'
  config.moe.eval_dispatch = ''  # Of evaluation; '': as in training.
  config.moe.capacity_factor = 1.25  # Of an even load: dispatch capacity.
  config.moe.router = ConfigDict({'type': 'TopK'})
  config.moe.balance = 'switch_sum'
  config.moe.aux_weight = 0.01
  config.moe.z_weight = 0.0  # 0.001 keeps the routers' logits small.
  config.moe.entropy_weight = 0.0  # > 0: routers decide; < 0: they explore.

  config.optimizer = ConfigDict()
  config.optimizer.type = 'AdamW'
  config.optimizer.learning_rate = 3e-4
  config.optimizer.weight_decay = 0.1
  config.optimizer.beta1 = 0.9
  config.optimizer.beta2 = 0.999
  config.optimizer.schedule = ConfigDict({'type': 'constant'})
  config.optimizer.clip_norm = 0.0  # Of the whole gradient; 0: never.
  config.optimizer.decay_mask = 'all'  # matrices: no biases, no norms.
  config.optimizer.spike_factor = 0.0  # Of the median loss: more is refused.
  config.optimizer.spike_window = 64  # Updates that the median is of.
  config.optimizer.ema_decay = 0.0  # Of the weights' average; 0: none.

  config.checkpoint = ConfigDict()
  config.checkpoint.keep_latest = 2  # And the best.

  config.callbacks = ConfigDict()
  config.callbacks.early_stopping = ConfigDict(
    {'type': 'EarlyStopping', 'patience': 0}
  )
  config.callbacks.non_finite = ConfigDict(
    {'type': 'RefusedUpdates', 'patience': 10, 'max_rollbacks': 0}
  )
  config.callbacks.profile = ConfigDict(
    {'type': 'Profile', 'num_steps': 0}  # Traced after the start; 0: none.
  )
  config.callbacks.routing_alarm = ConfigDict(
    {
      'type': 'RoutingAlarm',
      'action': 'warn',  # raise: the balance loss's weight; stop: the run.
      'dead_steps': 500,  # Without a token for an expert.
      'max_vio': None,  # Largest over mean load - 1; None: 0.9 of the worst.
      'factor': 2.0,  # Of the weight, each time that it is raised,
      'min_weight': 0.01,  # to this at least,
      'max_weight': 1.0,  # and to this at most.
    }
  )

  config.writers = ConfigDict()  # Beside TensorBoard and metrics.jsonl.

  config.sample = ConfigDict()
  config.sample.every_steps = 1000  # And at the end; 0: then alone.
  config.sample.num_tokens = 500  # Generated; 0: none.
  config.sample.temperature = 0.8
  return config
