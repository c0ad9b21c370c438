"""Page of the figures: one HTML file that needs no network."""

from importlib import resources
import json
from typing import Any

from trainers.files import jsonable


def html(values: dict[str, Any]) -> str:
  """Returns the page.

  The figures are a JSON literal of the page, and the script writes texts by
  `textContent` alone: no text of a run can become markup.

  Args:
    values: Facts and figures, as JSON values.
  """
  parts = {
    '/* STYLE */': _asset('page.css'),
    '/* SCRIPT */': _asset('page.js'),
    # "<" could end the element that holds the JSON.
    '@DATA@': _json(values).replace('<', '\\u003c'),
  }
  page = _asset('page.html')
  for place, text in parts.items():
    before, _, after = page.partition(place)
    page = before + text + after
  return page


def _json(values: dict[str, Any]) -> str:
  return json.dumps(
    jsonable(values),
    separators=(',', ':'),  # Spaces would be a sixth of the page.
    allow_nan=False,
    ensure_ascii=False,
  )


def _asset(name: str) -> str:
  folder = resources.files('nanomoe.inspection')
  return folder.joinpath(name).read_text(encoding='utf-8')
