"""Sampling from a model, with a decode cache.

A token sees a window of at most `block_size` tokens. A full window restarts
with its second half. It cannot slide: positions are absolute, so each slide
would change the position of every token in the cache.
"""

from collections.abc import Iterator, Sequence
import time
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from nanomoe.model.decode_cache import DecodeCache
from trainers.runtime import debugging, keys


@runtime_checkable
class LogitsFn(Protocol):
  """Function from tokens to logits, such as `LanguageModel.logits`."""

  def __call__(
    self,
    trained: Any,
    tokens: jax.Array,
    cache: DecodeCache | None = None,
    length: jax.Array | None = None,
  ) -> tuple[jax.Array, DecodeCache]:
    """Returns the logits of each token, and the decode cache for later tokens.

    Args:
      trained: Pair of params and model_state.
      tokens: Token ids, `int32[batch, time]`.
      cache: Decode cache of the tokens before; None at the beginning of a
        window.
      length: Number of tokens in each sequence, after which there is padding;
        None without padding.
    """
    ...


class Sampling(NamedTuple):
  """Distribution that tokens are drawn from.

  Its values are traced, so that no change of them causes a compilation.

  Attributes:
    temperature: Divisor of the logits; 0 takes the most likely token.
    top_k: Number of the most likely tokens to draw from; 0 draws from all.
    top_p: Probability that the most likely tokens to draw from must reach
      together (Holtzman et al. 2020); 1 draws from all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


# At lower temperatures float32 overflows, and only ties could be drawn from.
GREEDY_BELOW = 1e-30


def draw(
  logits: Float[Array, 'batch vocab'], key: jax.Array, sampling: Sampling
) -> Int[Array, ' batch']:
  """Draws one token for each sequence.

  Args:
    logits: Logits of the next token.
    key: Random key of the draw.
    sampling: Distribution to draw from.

  Returns:
    The token ids.
  """
  temperature, top_k, top_p = sampling
  is_greedy = jnp.asarray(temperature) < GREEDY_BELOW
  # JAX_DEBUG_INFS must not find the infinities of these masks.
  with jax.debug_infs(False):
    logits = logits / jnp.where(is_greedy, 1.0, temperature)
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.where(top_k > 0, top_k, logits.shape[-1]) - 1
    least = jnp.take(ordered, jnp.minimum(rank, logits.shape[-1] - 1), axis=-1)
    kept = jnp.where(ordered >= least[:, None], ordered, -jnp.inf)
    probs = jax.nn.softmax(kept)
    # A token is needed if those before it do not reach top_p; the first one is.
    needed = (jnp.cumsum(probs, axis=-1) - probs < top_p).at[:, 0].set(True)
    nucleus = jnp.min(jnp.where(needed, kept, jnp.inf), axis=-1)
    allowed = logits >= jnp.maximum(least, nucleus)[:, None]
    drawn = jax.random.categorical(key, jnp.where(allowed, logits, -jnp.inf))
    return jnp.where(is_greedy, jnp.argmax(logits, axis=-1), drawn)


# Largest number of tokens that one call of the device adds.
MAX_TOKENS = 64
# Duration of a call in seconds. Calls are then too rare to cost time, and often
# enough for a reader of the text.
CALL_SECONDS = 0.1


class Generator:
  """Generator of continuations of prompts.

  It compiles two programs, whatever the lengths. One reads a window, and one
  adds tokens to the window.

  Args:
    logits: Function from tokens to logits, of a causal model.
    trained: Pair of params and model_state.
    block_size: Number of tokens in a window.
    cached: Whether the decode cache is used. False reads the whole window for
      each token, which is the definition of generation.
  """

  def __init__(
    self,
    logits: LogitsFn,
    trained: Any,
    block_size: int,
    *,
    cached: bool = True,
  ):
    def read(trained, window, length, key, index, sampling):
      every, cache = logits(trained, window, length=length)
      last = jnp.take_along_axis(every, length[:, None, None] - 1, axis=1)
      key = jax.random.fold_in(key, index)
      return draw(last[:, 0], key, sampling), cache

    def add(trained, token, cache, key, index, num_tokens, sampling):
      def body(i, carry):
        tokens, token, cache = carry
        last, cache = logits(trained, token[:, None], cache)
        token = draw(last[:, 0], jax.random.fold_in(key, index + i), sampling)
        return tokens.at[i].set(token), token, cache

      tokens = jnp.zeros((MAX_TOKENS, *token.shape), token.dtype)
      return jax.lax.fori_loop(0, num_tokens, body, (tokens, token, cache))

    self.trained = jax.device_put(trained)
    self.block_size = block_size
    self.cached = cached
    self._read = jax.jit(read)
    # JAX may run the function again to find a NaN.
    donated = () if debugging.finds_nans() else ('cache',)
    self._add = jax.jit(add, donate_argnames=donated)

  def __call__(
    self,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    sampling: Sampling,
    seed: int,
  ) -> Iterator[np.ndarray]:
    """Yields the next token of each sequence, `num_tokens` times.

    A yielded array is `int32[batch]`, and comes soon after it is drawn.

    Args:
      prompts: Token ids, one or more for each sequence. Only the last
        `block_size` of them are read.
      num_tokens: Number of tokens to generate for each sequence.
      sampling: Distribution to draw from.
      seed: Random seed of the draws. Token i depends on the seed, on i and on
        the tokens before it.
    """
    size = self.block_size
    window = np.zeros((len(prompts), size), np.int32)
    length = np.array([min(len(p), size) for p in prompts], np.int32)
    for row, prompt in zip(window, prompts, strict=True):
      row[: min(len(prompt), size)] = prompt[-size:]
    key = keys.make(seed)
    # Processes that measured other times would call other programs.
    is_timed = jax.process_count() == 1
    cache, token, num_done = None, None, 0
    chunk_size = 1 if is_timed else MAX_TOKENS
    while num_done < num_tokens:
      if cache is None:
        with debugging.checked():
          token, cache = self._read(
            self.trained, window, length, key, num_done, sampling
          )
        drawn = np.asarray(token)[None]
      else:
        start = time.perf_counter()
        # The token that restarts a window is still drawn from the full window.
        room = size - int(length.max()) + 1
        count = min(chunk_size, room, num_tokens - num_done)
        with debugging.checked():
          tokens, token, cache = self._add(
            self.trained, token, cache, key, num_done, count, sampling
          )
        drawn = np.asarray(tokens)[:count]
        seconds = time.perf_counter() - start
        is_short = is_timed and 2 * seconds < CALL_SECONDS
        if count == chunk_size and is_short:
          chunk_size = min(2 * chunk_size, MAX_TOKENS)
      num_done += len(drawn)
      yield from drawn
      if self._append(window, length, drawn) or not self.cached:
        cache = None

  def _append(self, window, length, drawn) -> bool:
    """Appends tokens to the windows, and returns whether one restarted."""
    restarted = False
    for token in drawn:
      full = length == self.block_size
      half = self.block_size // 2
      window[full, :half] = window[full, self.block_size - half :]
      length[full] = half
      window[np.arange(len(token)), length] = token
      length += 1
      restarted |= bool(full.any())
    return restarted
