"""Floating-point work of a model's matrix products, by a formula."""


def ideal(
  *,
  num_tokens: int,
  block_size: int,
  vocab_size: int,
  d_model: int,
  num_layers: int,
  num_experts: int,
  experts_per_token: int,
  d_ff: int,
) -> int:
  """A training step's products if an expert computes its own tokens only.

  6 per parameter and token: 2 forward, 4 backward; attention's scores and sums
  over the whole window, as a masked product computes them.
  """
  attention = 4 * d_model * d_model + 2 * block_size * d_model
  router = d_model * num_experts
  experts = experts_per_token * 2 * d_model * d_ff
  layers = num_layers * (attention + router + experts)
  return 6 * num_tokens * (layers + d_model * vocab_size)
