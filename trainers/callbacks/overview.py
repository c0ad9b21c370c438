"""The table of parameters, once."""

import logging

from clu import parameter_overview

from trainers.callbacks.callback import Callback

log = logging.getLogger(__name__)


class ParameterOverview(Callback):
  """Writes name, shape and size of every parameter to the log file."""

  def on_fit_start(self, loop):
    table = parameter_overview.get_parameter_overview(
      loop.state.params, include_stats=False
    )
    log.debug('parameters:\n%s', table)
