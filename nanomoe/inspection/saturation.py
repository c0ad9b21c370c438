"""Router saturation: the share of the final choices that a checkpoint makes.

Muennighoff et al. 2024 (OLMoE), sec. 5.1.
"""

from typing import NamedTuple

from jaxtyping import Float
import numpy as np

from nanomoe.inspection.coactivation import membership
from nanomoe.inspection.trace import Trace


class Saturation(NamedTuple):
  """Overlap of the choices of two checkpoints, by layer.

  Attributes:
    overlap: Share of the later checkpoint's choices that the earlier one makes
      too, for the same tokens.
    chance: Overlap of the same loads if tokens were exchanged at random.
  """

  overlap: Float[np.ndarray, ' layers']
  chance: Float[np.ndarray, ' layers']


def saturation(earlier: Trace, final: Trace) -> Saturation:
  """Returns the overlap of the choices of two checkpoints.

  Args:
    earlier: Routing by the earlier checkpoint.
    final: Routing of the same tokens by the last checkpoint.
  """
  overlap, chance = [], []
  for a, b in zip(earlier.experts, final.experts, strict=True):
    before = membership(a, earlier.num_experts)
    after = membership(b, final.num_experts)
    total = max(np.count_nonzero(after), 1)
    overlap.append(np.count_nonzero(before & after) / total)
    loads = before.sum(axis=0) * after.sum(axis=0)
    chance.append(loads.sum() / len(before) / total)
  return Saturation(np.array(overlap), np.array(chance))
