"""A trainer for any task: the loop, callbacks, checkpoints and writers.

Importing it makes CLU's writers work without TensorFlow (see clu_writers).
"""

from trainers import clu_writers

clu_writers.install()
