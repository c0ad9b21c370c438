"""First experiment in minutes: the model of base.py, trained for 600 steps.

  python -m nanomoe.main --config=configs/quick.py --workdir=runs/top2
  python -m nanomoe.main --config=configs/quick.py --workdir=runs/top1 \
    --config.moe.top_k=1

Measured: val cross-entropy 2.0367, 600 steps in 4 minutes on 2 cores.

docs/tutorial.md shows the results of both commands.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.update(
    {
      'num_train_steps': 600,
      'eval_interval': 100,
      # The whole split is exact and takes less time than 200 batches.
      'eval_iters': 0,
      'log_interval': 20,
      'optimizer': {
        'learning_rate': 3e-3,
        'schedule': {'type': 'warmup_cosine', 'warmup_steps': 60},
      },
      'sample': {'every_steps': 200},
    }
  )
  return config
