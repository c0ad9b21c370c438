"""Processes of one training run on this machine, joined over loopback."""

from collections.abc import Mapping, Sequence
import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from trainers.callbacks import Callback
from trainers.checkpoint import arrays
from trainers.files import write_atomically

ROOT = pathlib.Path(__file__).parent.parent
# Compilation of several programs on two cores takes most of a short run.
TIMEOUT_SECONDS = 900.0
_POLL_SECONDS = 0.05
# Ports that no system gives to a program that asks for any port.
_PORTS = 20_000, 32_000
# File of `StartFingerprints` in a workdir.
FINGERPRINTS = 'start_fingerprints.json'


def free_port() -> int:
  """Returns a port of the loopback interface that no process uses."""
  while True:
    port = random.SystemRandom().randrange(*_PORTS)
    with contextlib.suppress(OSError), socket.socket() as probe:
      probe.bind(('127.0.0.1', port))
      return port


def environment(num_devices: int) -> dict[str, str]:
  """Returns the variables of a process with virtual CPU devices.

  Args:
    num_devices: Number of devices.
  """
  return {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(num_devices),
  }


class ProcessGroup:
  """Processes that run a command together; leaving the context kills them.

  Args:
    words: Arguments of `python -m module`.
    outputs: Directory of the outputs, a file for each process.
    size: Number of processes; a single one needs no coordinator.
    num_devices: Number of virtual CPU devices of each process.
    module: Module of the command.

  Attributes:
    processes: Processes in the order of their ids.
    started: Time of the start, as of `time.monotonic`.
  """

  def __init__(
    self,
    words: Sequence[str],
    outputs: pathlib.Path,
    size: int = 1,
    num_devices: int = 1,
    module: str = 'nanomoe.main',
  ):
    outputs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    self._outputs = [outputs / f'output.{i}.txt' for i in range(size)]
    self.processes: list[subprocess.Popen] = []
    self.started = time.monotonic()
    for index, path in enumerate(self._outputs):
      place = [
        f'--coordinator=127.0.0.1:{port}',
        f'--num_processes={size}',
        f'--process_id={index}',
      ]
      with open(path, 'w') as output:
        self.processes.append(
          subprocess.Popen(
            [sys.executable, '-m', module, *words, *place * (size > 1)],
            cwd=ROOT,
            env=environment(num_devices),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
          )
        )

  def wait(self, timeout: float = TIMEOUT_SECONDS) -> list[int | None]:
    """Returns the exit codes, None for a process that is alive at the timeout.

    Args:
      timeout: Seconds.
    """
    end = time.monotonic() + timeout
    while self.alive() and time.monotonic() < end:
      time.sleep(_POLL_SECONDS)
    return [process.poll() for process in self.processes]

  def alive(self) -> list[int]:
    """Returns the ids of the processes that have not ended."""
    return [i for i, p in enumerate(self.processes) if p.poll() is None]

  def output(self, index: int = 0) -> str:
    """Returns the output of a process.

    Args:
      index: Id of the process.
    """
    return self._outputs[index].read_text(errors='replace')

  def check(self) -> None:
    """Waits for the end.

    Raises:
      RuntimeError: A process did not end with exit code 0.
    """
    codes = self.wait()
    if any(codes):
      last = '\n'.join(self.output(i)[-2000:] for i in range(len(codes)))
      raise RuntimeError(f'exit codes {codes}:\n{last}')

  def kill(self, index: int) -> None:
    """Kills a process with SIGKILL.

    Args:
      index: Id of the process.
    """
    self.processes[index].send_signal(signal.SIGKILL)

  def __enter__(self) -> 'ProcessGroup':
    return self

  def __exit__(self, *_) -> None:
    for index in self.alive():
      self.kill(index)
    for process in self.processes:
      process.wait()


def train(
  workdir: pathlib.Path,
  changes: Mapping[str, Any],
  size: int = 1,
  num_devices: int = 1,
  words: Sequence[str] = (),
) -> str:
  """Trains or resumes base.py with changes; returns the output of process 0.

  Args:
    workdir: Directory of the run.
    changes: Values by config key.
    size: Number of processes.
    num_devices: Number of devices of each process.
    words: Further arguments of the command.

  Raises:
    RuntimeError: A process did not end with exit code 0.
  """
  arguments = [*arguments_of(workdir, changes), *words]
  outputs = workdir.with_name(f'{workdir.name}.outputs')
  with ProcessGroup(arguments, outputs, size, num_devices) as group:
    group.check()
    return group.output()


def arguments_of(
  workdir: pathlib.Path, changes: Mapping[str, Any]
) -> list[str]:
  """Returns the arguments of the train command for base.py with changes.

  Args:
    workdir: Directory of the run.
    changes: Values by config key.
  """
  keys = [f'--config.{key}={value}' for key, value in changes.items()]
  return ['--config=configs/base.py', f'--workdir={workdir}', *keys]


class StartFingerprints(Callback):
  """Plug-in that writes the fingerprints of the state at the start of a run."""

  def on_fit_start(self, loop):
    state = arrays.flatten_by_name({'state': loop.state})
    # Fingerprints of divided arrays need all processes.
    found = arrays.fingerprints(state)
    if loop.is_first:
      write_atomically(loop.workdir / FINGERPRINTS, json.dumps(found))
