"""Writes the reference pages of the documentation site from the code.

mkdocs calls `on_config` and `on_files` (`hooks` in mkdocs.yml). No generated
page is kept in the repository. `pages` does all of it without mkdocs.
"""

import ast
from collections.abc import Iterable, Iterator
import importlib
import inspect
import pathlib
import signal
import sys
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # The checkout, not an installed copy.

# Every module that a page reads: the one place to edit when modules move.
MODULES = {
  'base': 'configs.base',
  'charts': 'nanomoe.run.charts',
  'cli': 'nanomoe.run.cli',
  'console': 'nanomoe.console',
  'main': 'nanomoe.main',
  'result': 'trainers.callbacks.result',
  'schema': 'nanomoe.config.schema',
}
# Commands with flags of their own; `nanomoe.console` calls them by name.
COMMANDS = (
  'nanomoe.main',
  'nanomoe.launch',
  'nanomoe.sweep',
  'nanomoe.evaluate',
  'nanomoe.generate',
  'nanomoe.routing',
  'nanomoe.plan',
  'nanomoe.compare',
)
PACKAGES = ('nanomoe', 'trainers')
# {config key: (module, table of the names that the key accepts)}.
NAMES = {
  'moe.router.type': ('nanomoe.moe.routers', 'ROUTERS'),
  'upcycle.type': ('nanomoe.model.upcycled_experts', 'UPCYCLINGS'),
  'moe.dispatch': ('nanomoe.moe.dispatch.registry', 'DISPATCH'),
  'moe.balance': ('nanomoe.moe.losses', 'BALANCE'),
  'moe.activation': ('nanomoe.ops.activations', 'ACTIVATIONS'),
  'model.attention.type': ('nanomoe.model.attention', 'ATTENTIONS'),
  'model.norm': ('nanomoe.model.norms', 'NORMS'),
  'model.position': ('nanomoe.model.positions', 'POSITIONS'),
  'data.tokenizer.type': ('nanomoe.data.tokenizers', 'TOKENIZERS'),
  'data.dataset.type': ('nanomoe.data.pipeline', 'DATASETS'),
  'optimizer.type': ('nanomoe.optimizers', 'OPTIMIZERS'),
  'optimizer.schedule.type': ('nanomoe.schedules', 'SCHEDULES'),
  'callbacks.NAME.type': ('nanomoe.experiment', 'CALLBACKS'),
  'writers.NAME.type': ('nanomoe.experiment', 'WRITERS'),
}

# Meaning of each status in EXIT_CODES. A status without a row fails the build.
STATUSES = {
  'done': 'Training ended as planned.',
  'diverged': 'Too many updates in a row were refused.',
  'collapsed': 'The routing alarm stopped the run.',
  'unsaved': 'The last state could not be saved.',
  'interrupted': 'A signal stopped the run; its state is saved.',
}
# Signals that stop a run.
SIGNALS = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2')
# Meaning of each file of a run; tests/test_main.py compares them with a run.
FILES = {
  'config.json': 'Every config key, with `auto` replaced by its choice.',
  'vocabulary.json': 'The tokenizer, and the name and SHA-256 of the text.',
  'metrics.jsonl': 'One JSON object per line: `step` and its metrics.',
  'events.out.tfevents.*': 'TensorBoard: speed, learning rate, alarms.',
  'train/': 'TensorBoard: metrics of the training split.',
  'val/': 'TensorBoard: metrics of the validation split, hyperparameters.',
  'checkpoints/': 'One directory per kept step; see the page on checkpoints.',
  'checkpoints.json': 'The steps whose checkpoints are on the disk.',
  'damaged_checkpoints/': 'Checkpoints that failed verification.',
  'undone_checkpoints/': 'Checkpoints of steps that a rollback undid.',
  'sample.txt': 'The text that the model generated at the end.',
  'result.json': (
    'Status, losses, speed, memory, versions, command, `JAX_*` variables and '
    '`XLA_FLAGS`, revision.'
  ),
  'log.txt': 'The terminal output with times, and the table of parameters.',
  'routing.html': 'The routing page, if `nanomoe routing` wrote it.',
  'routing.json': 'The figures of the routing page.',
}

_INDEX = 'reference/api/index.md'


class Page(NamedTuple):
  """A generated page: its title in the navigation and its Markdown."""

  title: str
  text: str


def pages() -> dict[str, Page]:
  """Returns {path below docs/: page} of everything that is generated."""
  return {
    'reference/config.md': Page('Config keys', _config()),
    'reference/names.md': Page('Built-in parts', _names()),
    'reference/config_files.md': Page('Config files', _config_files()),
    'reference/commands.md': Page('Commands', _commands()),
    'reference/exit_codes.md': Page('Exit codes', _exit_codes()),
    'reference/run_directory.md': Page('Run directory', _run_directory()),
    'reference/metrics.md': Page('Metrics', _metrics()),
    **_api(),
    'step_time.md': Page('Step time', _notes()),
  }


def on_config(config):
  """Adds the pages of the API to the navigation, a section per package."""
  tree: dict[str, list[Any]] = {}
  for path, page in _api().items():
    if path == _INDEX:
      continue
    package, _, name = page.title.rpartition('.')
    if _is_package(page.title):
      tree.setdefault(page.title, []).insert(0, {page.title: path})
    else:
      tree.setdefault(package, []).append({name: path})
  sections = [{package: entries} for package, entries in tree.items()]
  for section in config.nav:
    for item in section.get('Reference', ()):
      if 'API' in item:
        item['API'] = [_INDEX, *sections]
  return config


def on_files(files, config):
  """Adds the generated pages to the site."""
  from mkdocs.structure.files import File  # noqa: PLC0415 (tests need no site)

  for path, page in pages().items():
    files.append(File.generated(config, path, content=page.text))
  return files


def _load(name: str) -> Any:
  return importlib.import_module(MODULES[name])


def _config() -> str:
  """Returns one table of config keys for each section."""
  schema = _load('schema')
  defaults = dict(schema.flatten(_load('base').get_config().to_dict()))
  keys = {key: (f.meaning, f.allowed) for key, f in schema.FIELDS.items()}
  name = 'a name or an import path'
  keys |= {f'{k}.type': (s.meaning, name) for k, s in schema.SPECS.items()}
  keys |= {
    f'{k}.NAME.type': (s.meaning, name) for k, s in schema.SPEC_GROUPS.items()
  }
  keys |= {key: (text, '') for key, text in schema.ARGUMENTS.items()}
  parts = [
    '# Config keys',
    'Generated from the schema. Every key is a command-line option '
    '`--config.KEY=VALUE`. Defaults are those of `configs/base.py`. '
    '[Configuration](../guides/configuration.md) explains their use.',
    'The last column says what a resumed run may do with a key. *yes*: the '
    'value may differ. *by name*: only an option on the command line changes '
    'it. *no*: a different value is refused. An option in that column allows '
    'the change.',
  ]
  sections: dict[str, list[list[str]]] = {}
  for key, (meaning, allowed) in keys.items():
    section = key.partition('.')[0] if '.' in key else 'Top level'
    default = _code(repr(defaults[key])) if key in defaults else ''
    row = [_code(key), meaning, allowed, default, _when_resumed(key)]
    sections.setdefault(section, []).append(row)
  head = ['key', 'meaning', 'allowed', 'default', 'resumed run']
  for section, rows in sections.items():
    title = section if section == 'Top level' else f'`{section}`'
    parts += [f'## {title}', _table(head, rows)]
  return '\n\n'.join(parts) + '\n'


def _when_resumed(key: str) -> str:
  declared = _load('schema').policy(key)
  if declared.allow:
    return _code(f'--allow_changed={declared.allow}')
  return {'fixed': 'no', 'by name': 'by name', 'free': 'yes'}[
    declared.resume.value
  ]


def _names() -> str:
  """Returns a table for each key that accepts the name of a built-in part."""
  parts = [
    '# Built-in parts',
    'Generated from the tables of names. A key that ends in `.type` also '
    'accepts the import path of [a plug-in](../plugins.md).',
  ]
  for key, (module, attribute) in NAMES.items():
    table = getattr(importlib.import_module(module), attribute)
    rows = [
      [_code(name), _first_line(part), _arguments(part)]
      for name, part in table.items()
    ]
    parts += [
      f'## `{key}`',
      _table(['name', 'meaning', 'arguments'], rows),
    ]
  return '\n\n'.join(parts) + '\n'


def _first_line(part: Any) -> str:
  """Returns the first line of the docstring of a part, or of its function."""
  if isinstance(part, tuple):  # A record around a function.
    part = next(x for x in part if callable(x))
  return (inspect.getdoc(part) or '').partition('\n')[0]


def _arguments(part: Any) -> str:
  """Returns the arguments that have a default, with that default."""
  if isinstance(part, tuple):
    return ''
  signature = inspect.signature(part)
  own = (
    p
    for p in signature.parameters.values()
    if p.default is not p.empty and p.name not in ('parent', 'name')
  )
  return ', '.join(_code(f'{p.name}={p.default!r}') for p in own)


def _config_files() -> str:
  """Returns the purpose and the source of each config file."""
  parts = [
    '# Config files',
    'Generated from `configs/`. [Results](../results.md) compares them.',
  ]
  for path in sorted((ROOT / 'configs').glob('*.py')):
    if path.stem != '__init__':
      text = path.read_text()
      title = (ast.get_docstring(ast.parse(text)) or '').partition('\n')[0]
      parts += [f'## `configs/{path.name}`', title, f'```python\n{text}```']
  return '\n\n'.join(parts) + '\n'


def _commands() -> str:
  """Returns usage and flags of each command."""
  parts = [
    '# Commands',
    'Generated from the flags of each command. `--help` prints the same.',
    '## `nanomoe`',
    '`python -m nanomoe` is the same command.',
    f'```\n{_load("console").usage()}\n```',
  ]
  for name in COMMANDS:
    module = importlib.import_module(name)
    usage, _, text = module._USAGE.strip().partition('\n')
    parts += [f'## `{name}`', f'```\n{usage}\n```', text.strip()]
    parts.append(_table(['flag', 'meaning', 'default'], _flags(module)))
  return '\n\n'.join(parts) + '\n'


def _flags(module: Any) -> Iterator[list[str]]:
  flags = importlib.import_module('absl.flags')
  for value in vars(module).values():
    if not isinstance(value, flags.FlagValues):
      continue
    for flag in _load('cli').own_flags(value):
      short = f'`-{flag.short_name}`, ' if flag.short_name else ''
      text = str(flag.help).partition(';\n')[0]
      has_default = flag.default not in (None, []) and not flag.boolean
      default = _code(repr(flag.default)) if has_default else ''
      yield [f'{short}`--{flag.name}`', text, default]


def _exit_codes() -> str:
  """Returns the exit codes of all commands."""
  cli = _load('cli')
  codes = _load('main').EXIT_CODES
  if missing := set(codes) - set(STATUSES):
    raise ValueError(f'STATUSES lacks a meaning of {sorted(missing)}')
  rows = [[code, f'`{s}`', STATUSES[s]] for s, code in codes.items()]
  rows += [
    [1, '', 'An unexpected error. Please report the traceback.'],
    [cli.USER_ERROR, '', 'A mistake of the user, reported in one line.'],
    [cli.USER_ERROR, '', 'No intact checkpoint; out of memory; full disk.'],
    [
      cli.USER_ERROR,
      '',
      'JAX cannot start: no such device; bad variable.',
    ],
    [cli.NOT_FINITE, '', '`JAX_DEBUG_NANS` or `JAX_DEBUG_INFS` found a value.'],
    [
      128 + signal.SIGPIPE,
      '',
      'The reader of the result of a command closed it, as `head` does.',
    ],
  ]
  rows += [
    [
      128 + signal.Signals[name],
      '',
      f'A second signal, {name}: the process ended at once, unsaved.',
    ]
    for name in SIGNALS
  ]
  rows.sort(key=lambda row: row[0])
  return '\n\n'.join(
    [
      '# Exit codes',
      'Generated from the code. The status is the field `status` of '
      '`result.json`. A status that a callback chose itself has the code '
      f'{_load("main").STOPPED}.',
      _table(['code', 'status', 'meaning'], rows),
      'The code of a second signal is 128 plus the number of the signal; the '
      'table has those of Linux. [Outputs that end]'
      '(../guides/resuming.md#outputs-that-end) explains code '
      f'{128 + signal.SIGPIPE}.',
    ]
  )


def _run_directory() -> str:
  """Returns the files of a run and the fields of result.json."""
  rows = [[_code(name), meaning] for name, meaning in FILES.items()]
  tree = ast.parse(inspect.getsource(_load('result')))
  fields = [
    key.value
    for node in ast.walk(tree)
    if isinstance(node, ast.Assign)
    and isinstance(node.targets[0], ast.Name)
    and node.targets[0].id == 'result'
    and isinstance(node.value, ast.Dict)
    for key in node.value.keys
    if isinstance(key, ast.Constant)
  ]
  return '\n\n'.join(
    [
      '# Run directory',
      'Training writes everything below `runs/<config>-<date>-<time>`, or '
      'below `--workdir=DIR`.',
      _table(['file', 'content'], rows),
      '`result.json` exists from the first step on and is replaced at each '
      'exit. Besides losses and facts about the machine, it has the fields '
      f'{", ".join(map(_code, fields))}.',
      'Which checkpoints are kept, and why a checkpoint is set aside: '
      '[checkpoints](../concepts/checkpoints.md).',
    ]
  )


def _metrics() -> str:
  """Returns the charts of TensorBoard and the names in metrics.jsonl."""
  rows = [
    [_code(name), chart.description, _code(chart.tag)]
    for name, chart in _load('charts').CHARTS.items()
  ]
  return '\n\n'.join(
    [
      '# Metrics',
      'Generated from the table of charts. `metrics.jsonl` has the name in the '
      'first column, behind `train/` or `val/` if the metric belongs to a '
      'split. TensorBoard has the name in the last column. A metric with '
      'one value per layer has one entry per layer with experts, from 0. '
      '[Routing](../routing.md#metrics) defines the metrics of experts.',
      _table(['metrics.jsonl', 'meaning', 'TensorBoard'], rows),
    ]
  )


def _api() -> dict[str, Page]:
  """Returns a page for each public module, and an overview."""
  modules = {name: doc for package in PACKAGES for name, doc in _walk(package)}
  found = {
    f'reference/api/{name}.md': Page(name, f'# `{name}`\n\n::: {name}\n')
    for name in modules
  }
  rows: dict[str, list[list[str]]] = {}
  for name, doc in modules.items():
    package = name if _is_package(name) else name.rpartition('.')[0]
    rows.setdefault(package, []).append([f'[`{name}`]({name}.md)', doc])
  parts = ['# API', 'Generated from the docstrings of every public module.']
  for package in sorted(rows):
    parts += [f'## {package}', _table(['module', 'content'], rows[package])]
  overview = Page('API', '\n\n'.join(parts) + '\n')
  return {_INDEX: overview, **found}


def _is_package(name: str) -> bool:
  return (ROOT / name.replace('.', '/')).is_dir()


def _walk(package: str) -> Iterator[tuple[str, str]]:
  """Yields (module, first line of its docstring), without importing it."""
  for path in sorted((ROOT / package).rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
    doc = ast.get_docstring(ast.parse(path.read_text())) or ''
    if doc and not any(part.startswith('_') for part in name.split('.')):
      yield name, doc.partition('\n')[0]


def _notes() -> str:
  return (ROOT / 'benchmarks' / 'NOTES.md').read_text()


def _table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
  """Returns a Markdown table."""
  lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
  lines += [f'| {" | ".join(map(_cell, row))} |' for row in rows]
  return '\n'.join(lines)


def _cell(value: Any) -> str:
  """Returns one line whose text, outside of `code`, is no Markdown or HTML."""
  parts = ' '.join(str(value).split()).replace('|', '\\|').split('`')
  for i in range(0, len(parts), 2):
    parts[i] = parts[i].replace('<', '&lt;').replace('*', '\\*')
  return '`'.join(parts)


def _code(text: str) -> str:
  return f'`{text}`' if text else ''
