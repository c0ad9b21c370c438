"""The `nanomoe` command: one name for all commands."""

import ast
from collections.abc import Callable, Mapping
import contextlib
import importlib
import inspect
import os
import pathlib
import sys
from typing import Any, NamedTuple

from absl import flags

import nanomoe
from nanomoe.config import help as help_lib
from nanomoe.config.schema import ARGUMENTS, FIELDS, SPECS
from nanomoe.run import cli
from trainers.errors import UserError
from trainers.spec import did_you_mean

# Stated here: a constant survives `python -OO`, a docstring does not.
USAGE = """nanomoe COMMAND [OPTION ...]

Trains, evaluates and samples sparse Mixture-of-Experts language models."""


class Command(NamedTuple):
  """A command with flags of its own.

  Attributes:
    module: Module with `main`, `_parse` and `_FLAGS`.
    meaning: What the command does, in one line.
  """

  module: str
  meaning: str


COMMANDS = {
  'train': Command('nanomoe.main', 'Trains a model, or resumes a run.'),
  'launch': Command(
    'nanomoe.launch', 'Trains in several processes of this machine.'
  ),
  'sweep': Command(
    'nanomoe.sweep', 'Trains runs that differ in some config keys.'
  ),
  'evaluate': Command(
    'nanomoe.evaluate', 'Prints the exact loss of a checkpoint as JSON.'
  ),
  'generate': Command(
    'nanomoe.generate', 'Prints text that a checkpoint generates.'
  ),
  'routing': Command(
    'nanomoe.routing', 'Writes a page about the experts that tokens choose.'
  ),
  'plan': Command(
    'nanomoe.plan', 'Prints the memory, the work and the time of a run.'
  ),
  'compare': Command(
    'nanomoe.compare', 'Compares runs: configs, costs, and losses.'
  ),
  'export': Command(
    'nanomoe.export', 'Exports a checkpoint to Hugging Face transformers.'
  ),
  'import_hf': Command(
    'nanomoe.import_hf', 'Makes a run of a model of transformers.'
  ),
}
# Kind of part that `nanomoe list` shows: the table of its names.
TABLES = {
  'routers': ('nanomoe.moe.routers', 'ROUTERS'),
  'dispatches': ('nanomoe.moe.dispatch.registry', 'DISPATCH'),
  'attention': ('nanomoe.model.attention', 'ATTENTIONS'),
  'optimizers': ('nanomoe.optimizers', 'OPTIMIZERS'),
  'callbacks': ('nanomoe.experiment', 'CALLBACKS'),
  'writers': ('nanomoe.experiment', 'WRITERS'),
}
# Commands with --config.KEY=VALUE.
_WITH_KEYS = ('train', 'launch', 'sweep', 'plan', 'import_hf')
KINDS = (*TABLES, 'configs')
SHELLS = ('bash', 'zsh')
_CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def main(entry: Callable[[], None] | None = None) -> None:
  """Runs the command that sys.argv names; exits with its code.

  Args:
    entry: Function of `__main__` that calls this one, under `python -m`.
  """
  # A script searches its own directory, and plug-ins are in the current one.
  with contextlib.suppress(OSError):  # Somebody deleted it.
    sys.path.append(os.getcwd())
  words = sys.argv[1:]
  if words and words[0] in COMMANDS:
    module = importlib.import_module(COMMANDS[words[0]].module)
    sys.argv = [f'nanomoe {words[0]}', *words[1:]]
    cli.run(module.main, module._parse, entry)
  else:
    cli.run(print_answer, lambda argv: argv[1:], entry)


def print_answer(words: list[str]) -> int:
  """Prints what a command without flags shows; returns the exit code."""
  cli.show(f'{answer(words)}\n')
  return 0


def answer(words: list[str]) -> str:
  """Returns what `nanomoe WORD ...` prints.

  Raises:
    UserError: There is no such command.
  """
  if not words or words[0] in ('-h', '-help', '--help', 'help'):
    return usage()
  if words == ['--version']:
    return f'nanomoe {nanomoe.__version__}'
  if words[0] == 'list':
    return listing(_one_of('list', KINDS, words[1:]))
  if words[0] == 'completion':
    return completion(_one_of('completion', SHELLS, words[1:]))
  names = [*COMMANDS, 'list', 'completion', '--version', '--help']
  raise UserError(
    f'unknown command {words[0]!r}; commands are {", ".join(names)}.'
    + did_you_mean(words[0], names)
  )


def _one_of(command: str, allowed: tuple[str, ...], words: list[str]) -> str:
  if len(words) == 1 and words[0] in allowed:
    return words[0]
  hint = did_you_mean(words[0], allowed) if words else ''
  raise UserError(
    f'nanomoe {command}: it needs one of {", ".join(allowed)}.{hint}'
  )


def usage() -> str:
  """Returns the commands, one line each."""
  rows = [(name, command.meaning) for name, command in COMMANDS.items()]
  rows += [
    ('list KIND', f'Lists built-in parts; KIND is one of {", ".join(KINDS)}.'),
    ('completion SHELL', 'Prints a completion script for bash or zsh.'),
    ('--version', 'Prints the version.'),
    ('COMMAND --help', 'Prints the options of a command.'),
  ]
  return f'{USAGE}\n\n{help_lib.columns(rows)}'


def listing(kind: str) -> str:
  """Returns a line for each built-in part of a kind, from its docstring."""
  if kind == 'configs':
    rows = [
      (f'configs/{path.name}', _first_sentence(_docstring_of(path)))
      for path in sorted(_CONFIGS.glob('*.py'))
      if path.stem != '__init__'
    ]
  else:
    module, name = TABLES[kind]
    table: Mapping[str, Any] = getattr(importlib.import_module(module), name)
    rows = [(k, _first_sentence(_doc(part))) for k, part in table.items()]
  width = max(len(name) for name, _ in rows)
  return '\n'.join(f'{name:{width}}  {text}' for name, text in rows)


def _doc(part: Any) -> str:
  """Returns the docstring of a part, or of the function in its record."""
  if isinstance(part, tuple):
    part = next(x for x in part if callable(x))
  return inspect.getdoc(part) or ''


def _docstring_of(path: pathlib.Path) -> str:
  """Returns the docstring of a Python file, without importing it."""
  return ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''


def _first_sentence(text: str) -> str:
  return ' '.join(text.partition('\n\n')[0].split())


def completion(shell: str) -> str:
  """Returns a script that completes commands, flags and config keys."""
  keys = [f'--config.{k}=' for k in (*FIELDS, *ARGUMENTS)]
  keys += [f'--config.{k}.type=' for k in SPECS]
  cases = []
  for name, command in COMMANDS.items():
    values = importlib.import_module(command.module)._FLAGS
    words = [
      f'--{flag.name}' + ('' if isinstance(flag, flags.BooleanFlag) else '=')
      for flag in cli.own_flags(values)
    ]
    words += keys if name in _WITH_KEYS else []
    cases.append(f'    {name}) words="{" ".join(words)}" ;;')
  names = ' '.join([*COMMANDS, 'list', 'completion', '--version', '--help'])
  start = (
    'autoload -U +X bashcompinit && bashcompinit\n' if shell == 'zsh' else ''
  )
  return f"""{start}_nanomoe() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words="{names}"
  COMPREPLY=()
  # Paths behind a "=" are completed as files.
  if [[ "$word" == "=" || "${{COMP_WORDS[COMP_CWORD-1]}}" == "=" ]]; then
    COMPREPLY=($(compgen -f -- "${{word#=}}"))
    return
  fi
  if [[ $COMP_CWORD -gt 1 ]]; then case "${{COMP_WORDS[1]}}" in
{chr(10).join(cases)}
    list) words="{' '.join(KINDS)}" ;;
    completion) words="{' '.join(SHELLS)}" ;;
    *) words="" ;;
  esac; fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [[ "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace 2>/dev/null
}}
complete -F _nanomoe nanomoe"""
