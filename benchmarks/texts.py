"""Other texts than Tiny Shakespeare, of what every Python has with it."""

import pathlib
import sysconfig

from nanomoe.data.corpus import EMBEDDED, cache_directory

DIRECTORY = cache_directory() / 'texts'
# {name: what it is}.
TEXTS = {
  'english': "English: the reference texts of Python's help",
  'python': 'Python: the source of its own library, without its tests',
}


def path(name: str) -> pathlib.Path:
  return DIRECTORY / f'{name}.txt'


def write() -> None:
  """All of them; the versions of Python differ a little."""
  DIRECTORY.mkdir(parents=True, exist_ok=True)
  path('english').write_text(EMBEDDED['pydoc_data.topics'](), encoding='utf-8')
  path('python').write_text(_python(), encoding='utf-8')


def _python() -> str:
  """11 MB."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  others = {'site-packages', 'test', 'tests', 'idlelib', 'lib2to3'}
  return ''.join(
    source.read_text(encoding='utf-8', errors='ignore')
    for source in sorted(root.rglob('*.py'))
    if not others & {*source.relative_to(root).parts}
  )
