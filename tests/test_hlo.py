"""What is read of a compiled program's text."""

import jax
import jax.numpy as jnp

from nanomoe.planning import hlo

# As XLA writes a product that it fused and left without a name.
_UNNAMED = """
%fused (a: f32[8,4], b: f32[4,2]) -> f32[8,2] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,2]{1,0} parameter(1)
  ROOT %dot = f32[8,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}
}

ENTRY %main (x: f32[8,4], w: f32[4,2]) -> f32[8,2] {
  %x = f32[8,4]{1,0} parameter(0), metadata={op_name="x"}
  %w = f32[4,2]{1,0} parameter(1)
  %other = f32[4,2]{1,0} negate(%w), metadata={op_name="other"}
  ROOT %fusion = f32[8,2]{1,0} fusion(%w, %x), kind=kCustom, calls=%fused
}
"""


def test_a_product_of_a_compiled_program():
  @jax.jit
  def run(x, w):
    with jax.named_scope('mine'):
      return x @ w

  shapes = jnp.ones((32, 16)), jnp.ones((16, 64))
  ops = hlo.parse(run.lower(*shapes).compile().as_text())
  product = max(ops.values(), key=lambda op: op.flops)
  assert product.flops == 2 * 32 * 16 * 64
  assert product.bytes == 4 * (32 * 16 + 16 * 64 + 32 * 64)
  assert 'mine' in product.source


def test_a_product_without_a_name_has_that_of_an_operand():
  fusion = hlo.parse(_UNNAMED)['fusion']
  assert fusion == hlo.Op('x', 2 * 8 * 4 * 2, 4 * (8 + 32 + 16), 'fusion')
