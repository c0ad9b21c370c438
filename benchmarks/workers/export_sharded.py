"""`nanomoe.export` with the weights in several files."""

import functools

from benchmarks.exports import SHARD_BYTES
from nanomoe import export
from nanomoe.portable import model
from nanomoe.run import cli

if __name__ == '__main__':
  model.write = functools.partial(model.write, shard_bytes=SHARD_BYTES)
  cli.run(export.main, export._parse)
