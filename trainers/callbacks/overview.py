"""Table of parameters in the log file."""

import logging

from clu import parameter_overview

from trainers.callbacks.callback import Callback

log = logging.getLogger(__name__)


class ParameterOverview(Callback):
  """Callback that logs name, shape and size of every parameter at the start."""

  def on_fit_start(self, loop):
    table = parameter_overview.get_parameter_overview(
      loop.state.params, include_stats=False
    )
    log.debug('parameters:\n%s', table)
