"""How TensorBoard shows a language model's run."""

from typing import Any

from nanomoe.config import schema
from nanomoe.config.schema import Config
from trainers.writers.run_writer import Chart, TensorBoardLayout

# Metrics without their split. An element of a vector, and a row of a matrix,
# is called by its layer, of those with experts: routing/router_entropy/0.
CHARTS = {
  'cross_entropy': Chart('loss/cross_entropy', 'Nats per token.'),
  'prediction_entropy': Chart(
    'loss/prediction_entropy',
    'Of the predictions, in nats: less than their cross-entropy if they are '
    'too sure.',
  ),
  'best_cross_entropy': Chart('loss/best_cross_entropy', 'Lowest so far.'),
  'bits_per_char': Chart(
    'loss/bits_per_char', 'Cross-entropy over ln 2, for a character.'
  ),
  'bits_per_byte': Chart(
    'loss/bits_per_byte', 'The same for a byte: it compares tokenizers.'
  ),
  'loss': Chart(
    'loss/total',
    'What is minimized: cross-entropy, weighted losses of routing, and less '
    'the weighted entropy of predictions.',
  ),
  'learning_rate': Chart('optimizer/learning_rate', 'Of the newest update.'),
  'gradient_norm': Chart('optimizer/gradient_norm', 'Before it is clipped.'),
  'skipped_updates': Chart(
    'optimizer/skipped_updates', 'Refused: not finite, or a spike.'
  ),
  'steps_per_sec': Chart('speed/steps_per_sec', 'Of training alone.'),
  'tokens_per_sec': Chart('speed/tokens_per_sec', 'Of training alone.'),
  'expert_load': Chart(
    'routing/expert_load',
    'A row for each layer of experts, a column for each of them. White: its '
    'fair share of the tokens; blue: less; red: more, twice that or above.',
  ),
  'aux_loss': Chart(
    'routing/aux_loss', 'The balance loss of all layers, unweighted.'
  ),
  'z_loss': Chart(
    'routing/z_loss', 'Mean square of the logsumexp of logits, unweighted.'
  ),
  'weighted_aux_loss': Chart(
    'loss/weighted_aux_loss', 'As it is in the total: a balance loss.'
  ),
  'weighted_z_loss': Chart('loss/weighted_z_loss', 'As it is in the total.'),
  'weighted_router_entropy': Chart(
    'loss/weighted_router_entropy', 'As it is in the total.'
  ),
  'aux_weight': Chart(
    'routing/aux_weight', "The balance loss's: an alarm may raise it."
  ),
  'load_entropy': Chart(
    'routing/load_entropy',
    'Of the loads over all batches, in nats: ln of the number of experts if '
    'they are even, 0 if one has all.',
  ),
  'max_over_mean_load': Chart(
    'routing/max_over_mean_load', 'Of the loads over all batches.'
  ),
  'max_vio': Chart(
    'routing/max_vio',
    'Largest load over the mean, less 1, of each batch; the mean over batches '
    '(MaxVio_batch, Wang et al. 2024).',
  ),
  'dead_experts': Chart(
    'routing/dead_experts',
    'The share of experts that had no token: since the log before, or in the '
    'evaluation.',
  ),
  'routing_alarms': Chart(
    'routing/alarms',
    'Experts that are dead for too long, and layers whose MaxVio is too large.',
  ),
  'routing_alarm': Chart('routing/alarm', 'What happened, and what was done.'),
  'router_entropy': Chart(
    'routing/router_entropy', "Mean over tokens of the router's, in nats."
  ),
  'first_gate': Chart(
    'routing/first_gate', 'Mean weight of the first choices of tokens.'
  ),
  'co_activation': Chart(
    'routing/co_activation',
    "How much of a layer's first choices the layer before tells: mutual "
    'information over entropy, 0 to 1. Its picture has a panel for each layer '
    'but the first, a row for each expert of the layer before, a column for '
    'each of its own. White: as often together as by chance; blue: less; red: '
    'more, twice that or above.',
  ),
  'load_history': Chart(
    'routing/load_history',
    'A row for each expert, layer by layer; time goes to the right, from the '
    'first step to this one. White: its fair share of the tokens; blue: less; '
    'red: more, twice that or above.',
  ),
  'specialization': Chart(
    'routing/specialization',
    'A row for each expert, layer by layer, a column for each token of the '
    'vocabulary (of large ones, the most frequent), which the text of this '
    'name lists. White: as often as for all tokens; blue: less; red: more, '
    'twice that or above; gray: no such token.',
  ),
  'dropped_fraction': Chart(
    'routing/dropped_fraction',
    'Of the assignments of tokens to experts; 0, unless the dispatch drops.',
  ),
  'sample': Chart('sample', 'Text from the model as it was at this step.'),
}

LAYOUT = {
  'loss': {
    'cross-entropy (nats)': r'loss/cross_entropy$',
    'bits per character': r'loss/bits_per_char$',
  },
  'routing': {
    'balance loss': r'routing/aux_loss$',
    'router entropy by layer (nats)': r'routing/router_entropy/\d+$',
    'load entropy by layer (nats)': r'routing/load_entropy/\d+$',
    'largest over mean load, by layer': r'routing/max_over_mean_load/\d+$',
    'MaxVio of a batch, by layer': r'routing/max_vio/\d+$',
    'dead experts, by layer': r'routing/dead_experts/\d+$',
    'first gate, by layer': r'routing/first_gate/\d+$',
    'co-activation with the layer before': r'routing/co_activation/\d+$',
    'alarms': r'routing/alarms$',
  },
  'optimizer': {
    'learning rate': r'optimizer/learning_rate$',
    'gradient norm': r'optimizer/gradient_norm$',
    'skipped updates': r'optimizer/skipped_updates$',
  },
  'speed': {
    'steps per second': r'speed/steps_per_sec$',
    'tokens per second': r'speed/tokens_per_sec$',
  },
}


def of(config: Config) -> TensorBoardLayout:
  """Runs are told apart by their config, and sorted by validation metrics."""
  flat = schema.flatten(config.to_dict())
  hparams = {key: _simple(value) for key, value in flat}
  return TensorBoardLayout(
    charts=CHARTS, layout=LAYOUT, hparams=hparams, split='val'
  )


def _simple(value: Any) -> bool | int | float | str:
  return value if isinstance(value, (bool, int, float, str)) else str(value)
