"""CLU without TensorFlow.

Importing clu.metric_writers or clu.periodic_actions imports TensorFlow (1.3 GB
installed, 6 s of each start) for the sake of one name,
clu.metric_writers.summary_writer.SummaryWriter. That module is supplied here
before CLU asks for it, with our writer, which needs TensorBoard alone.
"""

import os
import sys
import types


class _Module(types.ModuleType):
  def SummaryWriter(self, logdir: str | os.PathLike):
    """Ours is looked for when called: it subclasses CLU's interface itself."""
    from trainers.writers.tensorboard import SummaryWriter  # noqa: PLC0415

    return SummaryWriter(logdir)


def install() -> None:
  name = 'clu.metric_writers.summary_writer'
  sys.modules.setdefault(name, _Module(name))
