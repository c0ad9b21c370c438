"""python -m benchmarks.generate [--against=nano-moe-jax]

Seconds of a text of 500 characters from a model of configs/base.py: the first
one, which compiles, and later ones. nano-moe-jax compiles for each length, so
it makes 30 characters only. Writes benchmarks/results/generate[-PEER].json.
"""

import contextlib
from typing import Any

from absl import flags

from benchmarks import peers, results
from nanomoe.run import cli

_FLAGS = flags.FlagValues()
_AGAINST = flags.DEFINE_enum(
  'against', None, ['nano-moe-jax'], 'A peer.', flag_values=_FLAGS
)
NUM_CHARACTERS = {'ours': 500, 'nano-moe-jax': 30}
_TEXTS = 5  # Warm ones.


def measure(names: list[str]) -> dict[str, Any]:
  """By worker: characters of a text, seconds of the first and of later ones."""
  with contextlib.ExitStack() as stack:
    workers = {n: stack.enter_context(peers.Worker(n)) for n in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(_TEXTS + 1):
      for name, worker in workers.items():
        seconds[name] += worker('generation', NUM_CHARACTERS[name])
  return {
    name: {
      'num_characters': NUM_CHARACTERS[name],
      'first_sec': first,
      **peers.summary(warm),
    }
    for name, (first, *warm) in seconds.items()
  }


def rows(figures: dict[str, Any]) -> list[str]:
  """Markdown rows as those of step_time: milliseconds for a character."""
  peer = _peer(figures)

  def milliseconds(name: str, key: str) -> float:
    side = figures['generation'][name]
    return 1000 * side[key] / side['num_characters']

  lines = []
  for key, label in [('median_sec', 'warm'), ('first_sec', 'first text')]:
    ours = milliseconds('ours', key)
    line = (
      f'| generation per character, {label}, ms | {peer or ""} | {ours:.2f} '
    )
    if peer:
      theirs = milliseconds(peer, key)
      line += f'| {theirs:.1f} | {theirs / ours:.0f} '
    lines.append(f'{line}|')
  return lines


def _peer(figures: dict[str, Any]) -> str | None:
  return next((n for n in figures['generation'] if n != 'ours'), None)


def main(_: None) -> int:
  peer = _AGAINST.value
  name = f'generate-{peer}' if peer else 'generate'
  names = ['ours', peer] if peer else ['ours']
  results.write(name, {'generation': measure(names)})
  print('\n'.join(rows(results.read(name) or {})))
  return 0


if __name__ == '__main__':
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__))
