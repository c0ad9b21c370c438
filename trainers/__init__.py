"""A trainer for any task: the loop, callbacks, checkpoints and writers.

Importing it makes CLU's writers work without TensorFlow (see clu_writers).
"""

from trainers.writers import clu_without_tensorflow

clu_without_tensorflow.install()
