"""Roll call of the processes of a run, before JAX connects them.

JAX aborts every process, with a stack of C++, if one does not arrive or is
started twice. The roll call finds such mistakes first, and all processes report
one line. Process 0 listens at the coordinator's address, answers all others at
once, and leaves the port to JAX.
"""

import contextlib
import errno
import json
import logging
import selectors
import socket
import threading
import time
from typing import Any, NamedTuple

from trainers.errors import UserError

log = logging.getLogger(__name__)

_FIRST_REPORT_SECONDS = 10.0
_ANSWER_SECONDS = 10.0  # What process 0 may take to start, beside the timeout.
_LATE_SECONDS = 3.0  # What a process may take to hear of an error.
_MAX_BYTES = 10_000  # A hello is shorter, and so is an answer.
_MAX_SHOWN = 8


class Hello(NamedTuple):
  """Message of a process that has arrived.

  Attributes:
    process_id: Number of the process, from 0.
    num_processes: Number of processes that the process was given.
  """

  process_id: int
  num_processes: int


class Answer(NamedTuple):
  """Message of process 0 to every process, empty if all have arrived.

  Attributes:
    error: A mistake that ends the run.
    interrupt: The signal that ended a process, and the process.
  """

  error: str = ''
  interrupt: str = ''


def wait_for_all(
  own: Hello,
  address: tuple[str, int],
  *,
  timeout: float,
  label: str,
  is_named_late: bool = False,
) -> None:
  """Returns when all processes of the run have arrived.

  Args:
    own: This process.
    address: Host and port at which process 0 listens.
    timeout: Seconds within which all processes must arrive.
    label: How errors name the address.
    is_named_late: Whether the name of the host may appear during the wait.

  Raises:
    UserError: A process did not arrive or was started twice, the number of
      processes differs between them, or process 0 cannot be reached.
    KeyboardInterrupt: A signal ended this process or another one.
  """
  host, port = address
  if own.process_id:
    found = _arrive(own, address, timeout, label, is_named_late)
  else:
    with _listener(host, port, label) as listener:
      desk = threading.Thread(
        target=_answer_all, args=(listener, own, timeout), daemon=True
      )
      desk.start()
      # Process 0 must reach itself by the name that the others use.
      try:
        found = _arrive(own, address, timeout, label, is_named_late)
      except KeyboardInterrupt:
        desk.join(1.0)  # The others hear of it.
        raise
      desk.join(_ANSWER_SECONDS)
  if found.error:
    raise UserError(found.error)
  if found.interrupt:
    raise KeyboardInterrupt(found.interrupt)


def bind_address(host: str, port: int) -> str | None:
  """Returns where JAX's service listens; None stands for all interfaces."""
  if not _is_loopback(host):
    return None
  return f'[{host}]:{port}' if ':' in host else f'{host}:{port}'


def _is_loopback(host: str) -> bool:
  return host in ('localhost', '::1') or host.startswith('127.')


def _listener(host: str, port: int, label: str) -> socket.socket:
  """Returns a socket that listens on the port, on loopback if `host` is that.

  Raises:
    UserError: The port is in use, or may not be used.
  """
  if _is_loopback(host):
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    where, is_dual = (host, port), False
  elif socket.has_dualstack_ipv6():
    family, where, is_dual = socket.AF_INET6, ('', port), True
  else:
    family, where, is_dual = socket.AF_INET, ('', port), False
  try:
    return socket.create_server(
      where, family=family, backlog=1024, dualstack_ipv6=is_dual
    )
  except OSError as error:
    reason = error.strerror
    if error.errno == errno.EADDRINUSE:
      reason = (
        f'port {port} of this machine is in use, by another program or another '
        'process 0; --coordinator or JAX_COORDINATOR_PORT chooses a port'
      )
    raise UserError(f'{label}: {reason}') from error


def _arrive(
  own: Hello,
  address: tuple[str, int],
  timeout: float,
  label: str,
  is_named_late: bool,
) -> Answer:
  """Says hello to process 0; returns its answer.

  Raises:
    UserError: Process 0 cannot be reached, or the answer is not its.
  """
  deadline = time.monotonic() + timeout
  while True:
    try:
      connection = socket.create_connection(address, timeout=_ANSWER_SECONDS)
      break
    except OSError as error:
      reason = error.strerror or str(error)
      is_unknown = isinstance(error, socket.gaierror)
      is_final = is_unknown and error.errno != socket.EAI_AGAIN
      if is_final and not is_named_late:
        raise UserError(
          f'{label}: the host {address[0]!r} is unknown ({reason})'
        ) from error
      if own.process_id == 0 and not is_unknown:  # It listens already.
        raise UserError(
          f'{label}: process 0 does not reach itself ({reason}); the host must '
          'be the machine of process 0'
        ) from error
    if time.monotonic() > deadline:
      raise UserError(
        f'{label}: process 0 did not answer within {timeout:g} s ({reason})'
      )
    time.sleep(0.2)
  with connection:
    # Process 0 has the same time from its own start on.
    connection.settimeout(timeout + _ANSWER_SECONDS)
    try:
      connection.sendall(json.dumps(own).encode() + b'\n')
      answer = connection.makefile('rb').readline(_MAX_BYTES)
    except TimeoutError as error:
      raise UserError(
        f'{label}: process 0 did not answer within {timeout:g} s'
      ) from error
    except KeyboardInterrupt as interrupt:
      with contextlib.suppress(OSError):
        connection.sendall(json.dumps(str(interrupt)).encode() + b'\n')
      raise
    except OSError:
      answer = b''
  try:
    return Answer(*json.loads(answer))
  except (ValueError, TypeError) as error:
    raise UserError(
      f'{label}: no answer of process 0; it has ended, or the port belongs to '
      'another program or to a run that has started'
    ) from error


def _answer_all(listener: socket.socket, own: Hello, timeout: float) -> None:
  """Waits for all processes, and sends each the same answer."""
  with selectors.DefaultSelector() as selector:
    selector.register(listener, selectors.EVENT_READ)
    answer = _collect(selector, own, timeout)
    for key in selector.get_map().values():
      if key.fileobj is not listener:
        _answer(key.fileobj, answer)
  deadline = time.monotonic() + _LATE_SECONDS
  while any(answer) and (left := deadline - time.monotonic()) > 0:
    listener.settimeout(left)
    with contextlib.suppress(OSError):
      _answer(listener.accept()[0], answer, is_heard=False)


def _answer(connection: Any, answer: Answer, *, is_heard: bool = True) -> None:
  """Sends an answer, unless the process has died since."""
  with connection, contextlib.suppress(OSError):
    connection.settimeout(1.0)
    if not is_heard:  # Closing a connection with unread bytes would reset it.
      connection.recv(_MAX_BYTES)
    connection.sendall(json.dumps(answer).encode() + b'\n')


def _collect(
  selector: selectors.BaseSelector, own: Hello, timeout: float
) -> Answer:
  """Returns the answer when all processes have arrived, or one cannot."""
  arrived: dict[int, socket.socket] = {}
  start = time.monotonic()
  next_report = _FIRST_REPORT_SECONDS
  while len(arrived) < own.num_processes:
    seconds = time.monotonic() - start
    missing = _shown(sorted({*range(own.num_processes)} - {*arrived}))
    if seconds >= timeout:
      return Answer(
        f'{missing} of {own.num_processes} did not arrive within {timeout:g} s '
        '(--start_timeout)'
      )
    if seconds >= next_report:
      log.info('waiting for %s of %d', missing, own.num_processes)
      next_report *= 2
    for key, _ in selector.select(min(timeout, next_report) - seconds):
      if key.data is None:  # The listener.
        connection, _ = key.fileobj.accept()  # pyright: ignore
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, bytearray())
      elif answer := _hear(selector, key, arrived, own):
        return answer
  return Answer()


def _hear(
  selector: selectors.BaseSelector,
  key: selectors.SelectorKey,
  arrived: dict[int, socket.socket],
  own: Hello,
) -> Answer | None:
  """Reads from a connection; returns an answer if the run cannot start."""
  connection = key.fileobj
  assert isinstance(connection, socket.socket)
  try:
    received = connection.recv(_MAX_BYTES)
  except OSError:
    received = b''
  key.data.extend(received)
  (process_id,) = [i for i, c in arrived.items() if c is connection] or [None]
  if received and b'\n' not in received and len(key.data) < _MAX_BYTES:
    return None  # More of the line will follow.
  said = _parsed(bytes(key.data))
  key.data.clear()
  if isinstance(said, str) and process_id is not None:
    return Answer(interrupt=f'{said or "Ctrl-C"} to process {process_id}')
  if not received or not isinstance(said, Hello):
    # A process that died may be started again.
    selector.unregister(connection)
    connection.close()
    arrived.pop(process_id, None)  # pyright: ignore
    return None
  if said.num_processes != own.num_processes:
    return Answer(
      f'process {said.process_id} was started with --num_processes='
      f'{said.num_processes}, process 0 with {own.num_processes}'
    )
  if said.process_id in arrived:
    return Answer(f'process {said.process_id} was started twice')
  arrived[said.process_id] = connection
  return None


def _parsed(data: bytes) -> Hello | str | None:
  """Returns a hello or the name of a signal; None for another program."""
  try:
    said = json.loads(data)
    if isinstance(said, str):
      return said
    hello = Hello(*said)
  except (ValueError, TypeError):
    return None
  is_valid = all(type(value) is int for value in hello)
  return hello if is_valid and hello.process_id >= 0 else None


def _shown(ids: list[int]) -> str:
  """Returns 'process 2' or 'processes 1, 2', shortened if there are many."""
  if len(ids) == 1:
    return f'process {ids[0]}'
  rest = len(ids) - _MAX_SHOWN
  more = f' and {rest} more' if rest > 0 else ''
  return f'processes {", ".join(map(str, ids[:_MAX_SHOWN]))}{more}'
