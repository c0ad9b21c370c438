"""Sampling from a model, with a cache of keys and values.

Each token sees a window of at most `block_size`. Positions are absolute, so a
window that slid by one would be new at every place: instead, when it is full,
it starts again from its later half.
"""

from collections.abc import Callable, Iterator, Sequence
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from nanomoe.model import Past
from trainers import debugging, keys

Logits = Callable[..., tuple[jax.Array, Past]]


class Sampling(NamedTuple):
  """How a token is drawn. Traced: no value costs a compilation.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest.
    top_k: draws from the k likeliest only; 0: from all.
    top_p: draws from the likeliest that make up this probability (Holtzman et
      al. 2020); 1: from all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


# At lower temperatures float32 overflows, and only ties could be drawn from.
GREEDY_BELOW = 1e-30


def draw(
  logits: Float[Array, 'batch vocab'], key: jax.Array, sampling: Sampling
) -> Int[Array, ' batch']:
  """A token for each row."""
  temperature, top_k, top_p = sampling
  is_greedy = jnp.asarray(temperature) < GREEDY_BELOW
  with jax.debug_infs(False):  # JAX_DEBUG_INFS is not about these masks.
    logits = logits / jnp.where(is_greedy, 1.0, temperature)
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.where(top_k > 0, top_k, logits.shape[-1]) - 1
    least = jnp.take(ordered, jnp.minimum(rank, logits.shape[-1] - 1), axis=-1)
    kept = jnp.where(ordered >= least[:, None], ordered, -jnp.inf)
    probs = jax.nn.softmax(kept)
    # A token is needed if those before it do not make up top_p; the first is.
    needed = (jnp.cumsum(probs, axis=-1) - probs < top_p).at[:, 0].set(True)
    nucleus = jnp.min(jnp.where(needed, kept, jnp.inf), axis=-1)
    allowed = logits >= jnp.maximum(least, nucleus)[:, None]
    drawn = jax.random.categorical(key, jnp.where(allowed, logits, -jnp.inf))
    return jnp.where(is_greedy, jnp.argmax(logits, axis=-1), drawn)


# Tokens that one call of the device may add, at most.
MAX_TOKENS = 64
# Seconds that a call should take: seldom enough to cost nothing beside the
# tokens, often enough for who watches.
CALL_SECONDS = 0.1


class Generator:
  """Continues prompts.

  Two programs are compiled, whatever the lengths: one reads a window, one
  adds tokens to it, as many as it is told.

  Args:
    logits: (trained, tokens, past) -> (logits, past), as
      LanguageModel.logits; where a position sees the future, its later rows
      must not matter.
    trained: params and model_state of the model.
    block_size: of the model.
    cached: False reads the whole window for each token: the definition.
  """

  def __init__(
    self, logits: Logits, trained: Any, block_size: int, *, cached: bool = True
  ):
    def read(trained, window, length, key, index, sampling):
      every, past = logits(trained, window)
      last = jnp.take_along_axis(every, length[:, None, None] - 1, axis=1)
      key = jax.random.fold_in(key, index)
      return draw(last[:, 0], key, sampling), past.cut(length)

    def add(trained, token, past, key, index, num_tokens, sampling):
      def body(i, carry):
        tokens, token, past = carry
        last, past = logits(trained, token[:, None], past)
        token = draw(last[:, 0], jax.random.fold_in(key, index + i), sampling)
        return tokens.at[i].set(token), token, past

      tokens = jnp.zeros((MAX_TOKENS, *token.shape), token.dtype)
      return jax.lax.fori_loop(0, num_tokens, body, (tokens, token, past))

    self.trained = jax.device_put(trained)
    self.block_size = block_size
    self.cached = cached
    self._read = debugging.checked()(jax.jit(read))
    # JAX may have to run the function again to find a NaN.
    donated = () if debugging.finds_nans() else ('past',)
    self._add = debugging.checked()(jax.jit(add, donate_argnames=donated))

  def __call__(
    self,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    sampling: Sampling,
    seed: int,
  ) -> Iterator[np.ndarray]:
    """Yields int32[batch] `num_tokens` times, soon after it is drawn.

    Args:
      prompts: a token or more each; only their last `block_size` are seen.
      num_tokens: to draw.
      sampling: how.
      seed: of the draws; token i depends on (seed, i) and what came before.
    """
    size = self.block_size
    window = np.zeros((len(prompts), size), np.int32)
    length = np.array([min(len(p), size) for p in prompts], np.int32)
    for row, prompt in zip(window, prompts, strict=True):
      row[: min(len(prompt), size)] = prompt[-size:]
    key = keys.make(seed)
    past, token, done, at_once = None, None, 0, 1
    while done < num_tokens:
      if past is None:
        token, past = self._read(
          self.trained, window, length, key, done, sampling
        )
        drawn = np.asarray(token)[None]
      else:
        start = time.perf_counter()
        # The token that makes a window start again is drawn from the old one.
        room = size - int(length.max()) + 1
        count = min(at_once, room, num_tokens - done)
        tokens, token, past = self._add(
          self.trained, token, past, key, done, count, sampling
        )
        drawn = np.asarray(tokens)[:count]
        seconds = time.perf_counter() - start
        if count == at_once and 2 * seconds < CALL_SECONDS:
          at_once = min(2 * at_once, MAX_TOKENS)
      done += len(drawn)
      yield from drawn
      if self._append(window, length, drawn) or not self.cached:
        past = None

  def _append(self, window, length, drawn) -> bool:
    """Puts tokens behind their windows; whether one started again."""
    again = False
    for token in drawn:
      full = length == self.block_size
      half = self.block_size // 2
      window[full, :half] = window[full, self.block_size - half :]
      length[full] = half
      window[np.arange(len(token)), length] = token
      length += 1
      again |= bool(full.any())
    return again
