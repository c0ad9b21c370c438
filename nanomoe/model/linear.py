"""Linear layer of everything but experts and routers."""

from flax import linen as nn
from jaxtyping import Array, Float

from nanomoe.ops.matmul import einsum


class Linear(nn.Module):
  """Linear layer `x @ kernel + bias`.

  Attributes:
    features: Width of the output.
    kernel_init: Initializer of the kernel.
    use_bias: Whether the layer has a bias.
    precision: Precision of the matrix product.
  """

  features: int
  kernel_init: nn.initializers.Initializer
  use_bias: bool
  precision: str

  @nn.compact
  def __call__(self, x: Float[Array, '*rows d_in']) -> Float[Array, '*rows d']:
    """Returns the layer's output."""
    shape = x.shape[-1], self.features
    kernel = self.param('kernel', self.kernel_init, shape)
    zeros = nn.initializers.zeros_init()
    bias = self.param('bias', zeros, shape[1:]) if self.use_bias else None
    rows = x.reshape(-1, x.shape[-1])
    y = einsum('nd,df->nf', rows, kernel, self.precision, bias)
    return y.reshape(*x.shape[:-1], self.features)
