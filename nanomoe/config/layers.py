"""Layers of a model: which of them have experts, and which repeat."""


def with_experts(num_layers: int, first: int, every: int) -> list[int]:
  """Returns the indices of the layers whose feed-forward layer has experts.

  Args:
    num_layers: Value of `model.num_layers`.
    first: Value of `moe.first_dense_layers`, before which no layer has experts.
    every: Value of `moe.every`. The number of a layer with experts, counted
      from 1, is a multiple of it.
  """
  return [i for i in range(first, num_layers) if (i + 1) % every == 0]


def repetition(num_layers: int, first: int, every: int) -> tuple[int, int]:
  """Returns the layers before the repeated ones, and the layers of a period.

  `every` successive layers after the first dense ones have one layer with
  experts, at the same place in each period. Without any experts all layers are
  equal, and each is a period.

  Args:
    num_layers: Value of `model.num_layers`.
    first: Value of `moe.first_dense_layers`.
    every: Value of `moe.every`.
  """
  return (first, every) if with_experts(num_layers, first, every) else (0, 1)
