"""The documented model on Tiny Shakespeare: 4 experts, two per character.

  python -m nanomoe.main --config=configs/base.py

The model has 2,409,025 parameters for 65 characters. A character uses 1,355,329
of them.

Measured: val cross-entropy 1.6118, 5000 steps in 27 minutes on 2 cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.num_train_steps = 5000
  config.batch_size = 32
  config.accumulate_steps = 1  # Micro-batches; more need less memory.
  config.block_size = 128  # Characters in a sequence.
  config.eval_interval = 250  # Steps between evaluations and checkpoints.
  config.eval_iters = 200  # Batches; 0 evaluates each target once.
  config.eval_weights = 'params'  # 'average' needs optimizer.ema_decay.
  config.log_interval = 50  # Steps between progress lines.
  config.confidence_weight = 0.0  # 0 disables the penalty.
  # Precision of the operands of matrix products; sums are float32. 'auto'
  # selects the fastest precision of the machine.
  config.precision = 'auto'
  config.init_from = ''  # Run whose weights this run starts from.
  # How experts start from a dense run; '' needs a run of the same shape.
  config.upcycle = ConfigDict({'type': ''})

  config.data = ConfigDict()
  config.data.path = ''  # Path of a UTF-8 text; '' selects Tiny Shakespeare.
  config.data.fallback = 'pydoc_data.topics'  # Text if there is no network.
  config.data.tokenizer = ConfigDict({'type': 'Characters'})
  config.data.dataset = ConfigDict({'type': 'Windows'})

  config.model = ConfigDict()
  config.model.d_model = 128
  config.model.vocab_rows = 0  # 0 means a row for each token.
  config.model.num_layers = 4
  config.model.num_heads = 4
  config.model.dropout_rate = 0.1
  config.model.scan_layers = False  # True compiles one layer, not each.
  config.model.logits_chunk = 0  # 0 computes the logits of a batch at once.
  # 'block' saves the most memory, for a third more work.
  config.model.remat = 'none'
  config.model.attention = ConfigDict({'type': 'CausalSelfAttention'})
  config.model.norm = 'LayerNorm'
  config.model.position = 'learned'
  config.model.conv_width = 1  # 1 disables the convolutions.
  config.model.max_ngram = 1  # 1 disables embeddings of n-grams.
  config.model.ngram_rows = 8192  # Largest number of rows of an n-gram table.
  config.model.num_kv_heads = 0  # 0 means num_heads.
  config.model.qk_norm = False
  config.model.bias = True
  config.model.zero_outputs = False  # True starts blocks as the identity.
  config.model.tie_embeddings = False
  config.model.logit_softcap = 0.0  # 0 disables the bound.

  config.moe = ConfigDict()
  config.moe.num_experts = 4
  config.moe.top_k = 2
  config.moe.d_ff = 512
  config.moe.activation = 'gelu'
  config.moe.num_shared = 0  # Experts of every token, in addition to top_k.
  config.moe.first_dense_layers = 0
  config.moe.every = 1  # 2 gives experts to every second layer.
  config.moe.dense_d_ff = 1024  # Width of layers without experts.
  config.moe.dispatch = 'auto'
  config.moe.eval_dispatch = ''  # Dispatch of evaluation; '' as in training.
  config.moe.exchange = 'auto'  # Between devices of a mesh.
  config.moe.capacity_factor = 1.25  # Capacity over the balanced load.
  config.moe.router = ConfigDict({'type': 'TopK'})
  config.moe.balance = 'switch_sum'
  config.moe.aux_weight = 0.01
  config.moe.z_weight = 0.0  # 0.001 keeps the routers' logits small.
  config.moe.entropy_weight = 0.0  # > 0 sharpens routing; < 0 flattens it.

  config.optimizer = ConfigDict()
  config.optimizer.type = 'AdamW'
  config.optimizer.learning_rate = 3e-4
  config.optimizer.weight_decay = 0.1
  config.optimizer.beta1 = 0.9
  config.optimizer.beta2 = 0.999
  config.optimizer.schedule = ConfigDict({'type': 'constant'})
  config.optimizer.clip_norm = 0.0  # 0 disables clipping.
  config.optimizer.decay_mask = 'all'  # 'matrices' excludes biases and norms.
  config.optimizer.spike_factor = 0.0  # 0 accepts every finite loss.
  config.optimizer.spike_window = 64  # Accepted updates in the median loss.
  config.optimizer.ema_decay = 0.0  # 0 keeps no average.

  config.mesh = ConfigDict()  # Of devices; one axis may be -1, for all.
  config.mesh.data = 1
  config.mesh.fsdp = 1
  config.mesh.expert = 1
  config.mesh.tensor = 1

  config.checkpoint = ConfigDict()
  config.checkpoint.keep_latest = 2  # The best checkpoint is kept as well.

  config.callbacks = ConfigDict()
  config.callbacks.early_stopping = ConfigDict(
    {'type': 'EarlyStopping', 'patience': 0}
  )
  config.callbacks.non_finite = ConfigDict(
    {'type': 'RefusedUpdates', 'patience': 10, 'max_rollbacks': 0}
  )
  config.callbacks.profile = ConfigDict(
    {'type': 'Profile', 'num_steps': 0}  # 0 disables the profile.
  )
  config.callbacks.routing_alarm = ConfigDict(
    {
      'type': 'RoutingAlarm',
      'action': 'warn',  # 'raise' raises moe.aux_weight; 'stop' stops the run.
      'dead_steps': 500,  # Steps without a token before an expert is dead.
      'max_vio': None,  # None means 0.9 of the largest possible MaxVio.
      'factor': 2.0,  # Factor of each increase of the weight.
      'min_weight': 0.01,  # Smallest weight after an increase.
      'max_weight': 1.0,  # Largest weight after an increase.
    }
  )

  # Writers in addition to TensorBoard and metrics.jsonl.
  config.writers = ConfigDict()

  config.sample = ConfigDict()
  config.sample.every_steps = 1000  # 0 samples at the end only.
  config.sample.num_tokens = 500  # 0 disables samples.
  config.sample.temperature = 0.8
  return config
