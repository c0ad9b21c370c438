"""How many pieces stay in the cache."""

import pytest

from nanomoe.moe.dispatch import pieces


@pytest.mark.parametrize(
  ('in_cache', 'num_pieces', 'expected'),
  [(9, 4, 4), (3, 4, 2), (4, 7, 1), (6, 12, 6), (0.5, 4, 1)],
)
def test_as_many_as_fit_and_divide_all(in_cache, num_pieces, expected):
  piece_bytes = int(pieces.CACHE_BYTES / in_cache)
  assert pieces.at_once(piece_bytes, num_pieces) == expected


def test_all_where_caches_are_not_what_counts(monkeypatch):
  monkeypatch.setattr(pieces.jax, 'default_backend', lambda: 'gpu')
  assert pieces.at_once(pieces.CACHE_BYTES, 4) == 4
