"""How TensorBoard shows a language model's run."""

from typing import Any

from nanomoe import schema
from nanomoe.config import Config
from trainers.board import Board, Chart

# Metrics without their split. An element of a vector, and a row of a matrix,
# is called by its layer, of those with experts: routing/router_entropy/0.
CHARTS = {
  'cross_entropy': Chart('loss/cross_entropy', 'Nats per token.'),
  'best_cross_entropy': Chart('loss/best_cross_entropy', 'Lowest so far.'),
  'bits_per_char': Chart(
    'loss/bits_per_char', 'Cross-entropy over ln 2, for a character.'
  ),
  'bits_per_byte': Chart(
    'loss/bits_per_byte', 'The same for a byte: it compares tokenizers.'
  ),
  'loss': Chart(
    'loss/total',
    'What is minimized: cross-entropy and weighted losses of routing.',
  ),
  'learning_rate': Chart('optimizer/learning_rate', 'Of the next update.'),
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
  'max_over_mean_load': Chart('routing/max_over_mean_load'),
  'router_entropy': Chart('routing/router_entropy'),
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
    'largest over mean load, by layer': r'routing/max_over_mean_load/\d+$',
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


def of(config: Config) -> Board:
  """Runs are told apart by their config, and sorted by validation metrics."""
  flat = schema.flatten(config.to_dict())
  hparams = {key: _simple(value) for key, value in flat}
  return Board(charts=CHARTS, layout=LAYOUT, hparams=hparams, split='val')


def _simple(value: Any) -> bool | int | float | str:
  return value if isinstance(value, (bool, int, float, str)) else str(value)
