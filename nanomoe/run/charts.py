"""Charts of a language model's run in TensorBoard."""

from typing import Any

from nanomoe.config import schema
from nanomoe.config.schema import Config
from trainers.writers.run_writer import Chart, TensorBoardLayout

# Names of metrics have no split. An element of a vector and a row of a matrix
# have the index of the layer among layers with experts, as in
# routing/router_entropy/0.
CHARTS = {
  'cross_entropy': Chart(
    'loss/cross_entropy', 'Cross-entropy, in nats per token.'
  ),
  'prediction_entropy': Chart(
    'loss/prediction_entropy',
    'Entropy of the predictions, in nats per token. Overconfident predictions '
    'have an entropy below their cross-entropy.',
  ),
  'best_cross_entropy': Chart(
    'loss/best_cross_entropy', 'Lowest cross-entropy so far, in nats per token.'
  ),
  'bits_per_char': Chart(
    'loss/bits_per_char', 'Cross-entropy, in bits per character.'
  ),
  'bits_per_byte': Chart(
    'loss/bits_per_byte',
    'Cross-entropy, in bits per byte; comparable between tokenizers.',
  ),
  'loss': Chart(
    'loss/total',
    'Training loss: cross-entropy plus the weighted routing losses, minus the '
    'weighted entropy of the predictions.',
  ),
  'learning_rate': Chart(
    'optimizer/learning_rate', 'Learning rate of the latest update.'
  ),
  'gradient_norm': Chart(
    'optimizer/gradient_norm', 'Norm of the gradient before clipping.'
  ),
  'skipped_updates': Chart(
    'optimizer/skipped_updates',
    'Number of refused updates, because of a non-finite value or a loss spike.',
  ),
  'steps_per_sec': Chart(
    'speed/steps_per_sec', 'Steps per second of training time.'
  ),
  'tokens_per_sec': Chart(
    'speed/tokens_per_sec', 'Tokens per second of training time.'
  ),
  'expert_load': Chart(
    'routing/expert_load',
    'Expert load, with a row per layer and a column per expert. White is the '
    'balanced load, blue is less, and red is more, up to twice the balanced '
    'load.',
  ),
  'aux_loss': Chart(
    'routing/aux_loss', 'Load-balancing loss of all layers, unweighted.'
  ),
  'z_loss': Chart(
    'routing/z_loss',
    'Router z-loss, the mean square of the logsumexp of logits, unweighted.',
  ),
  'weighted_aux_loss': Chart(
    'loss/weighted_aux_loss',
    'Weighted load-balancing loss, as added to the training loss.',
  ),
  'weighted_z_loss': Chart(
    'loss/weighted_z_loss',
    'Weighted router z-loss, as added to the training loss.',
  ),
  'weighted_router_entropy': Chart(
    'loss/weighted_router_entropy',
    'Weighted router entropy, as added to the training loss.',
  ),
  'aux_weight': Chart(
    'routing/aux_weight',
    'Weight of the load-balancing loss, which a routing alarm may raise.',
  ),
  'load_entropy': Chart(
    'routing/load_entropy',
    'Entropy of the expert loads over all batches, in nats. It is ln of the '
    'number of experts for balanced loads and 0 if one expert has every token.',
  ),
  'max_over_mean_load': Chart(
    'routing/max_over_mean_load',
    'Largest over mean expert load, over all batches.',
  ),
  'max_vio': Chart(
    'routing/max_vio',
    'Largest over mean expert load of a batch, minus 1, averaged over batches '
    '(MaxVio_batch, Wang et al. 2024).',
  ),
  'dead_experts': Chart(
    'routing/dead_experts',
    'Fraction of experts without a token since the last log, or in the '
    'evaluation.',
  ),
  'routing_alarms': Chart(
    'routing/alarms',
    'Number of experts that are dead for too long, plus layers whose MaxVio '
    'exceeds its limit.',
  ),
  'routing_alarm': Chart(
    'routing/alarm', 'Text of a routing alarm: its cause and its action.'
  ),
  'router_entropy': Chart(
    'routing/router_entropy',
    "Entropy of the router's probabilities, in nats, averaged over tokens.",
  ),
  'first_gate': Chart(
    'routing/first_gate', "Weight of a token's first choice, mean over tokens."
  ),
  'co_activation': Chart(
    'routing/co_activation',
    "Mutual information of a layer's and the previous layer's first choices, "
    "divided by the entropy of the layer's choices; 0 to 1. The picture has a "
    'panel per layer after the first. A row is an expert of the previous '
    "layer, and a column is an expert of the panel's layer. White pairs are "
    'as frequent as by chance, blue pairs less, red pairs more, up to twice '
    'as frequent.',
  ),
  'load_history': Chart(
    'routing/load_history',
    'Expert load over time, with a row per expert, grouped by layer, and steps '
    'from left to right. White is the balanced load, blue is less, and red is '
    'more, up to twice the balanced load.',
  ),
  'specialization': Chart(
    'routing/specialization',
    'Share of each token that an expert gets, with a row per expert, grouped '
    'by layer. Columns are tokens of the vocabulary, or the most frequent ones '
    'of a large vocabulary; the text of this name lists them. White is the '
    "expert's share of all tokens, blue is less, red is more, up to twice that "
    'share, and gray means that the token did not occur.',
  ),
  'dropped_fraction': Chart(
    'routing/dropped_fraction',
    'Fraction of assignments of tokens to experts that are dropped; 0 unless '
    'the dispatch has a capacity.',
  ),
  'sample': Chart('sample', 'Text that the model generated at this step.'),
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
  """Returns the TensorBoard layout of a run.

  Hyperparameters are the config keys, and the metrics of the hyperparameter
  table are those of the validation split.

  Args:
    config: Config of the run.
  """
  flat = schema.flatten(config.to_dict())
  hparams = {key: _simple(value) for key, value in flat}
  return TensorBoardLayout(
    charts=CHARTS, layout=LAYOUT, hparams=hparams, split='val'
  )


def _simple(value: Any) -> bool | int | float | str:
  return value if isinstance(value, (bool, int, float, str)) else str(value)
