"""A first finding in minutes: base.py's model, trained faster and shorter.

  python -m nanomoe.main --config=configs/quick.py --workdir=runs/top2
  python -m nanomoe.main --config=configs/quick.py --workdir=runs/top1 \
    --config.moe.top_k=1

The table of configs in README.md has time and loss of both.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.num_train_steps = 600
  config.eval_interval = 100
  config.eval_iters = 0  # The whole split: exact, and quicker than 200 batches.
  config.log_interval = 20

  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule = ConfigDict(
    {'type': 'warmup_cosine', 'warmup_steps': 60}
  )
  return config
