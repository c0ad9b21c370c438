"""A trainer for any task: the loop, callbacks, checkpoints and writers.

Importing it makes CLU's writers work without TensorFlow; see
`trainers.writers.clu_without_tensorflow`.
"""

from trainers.writers import clu_without_tensorflow

clu_without_tensorflow.install()
