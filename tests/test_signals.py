"""Signals: the first is a flag, the second is the end."""

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from trainers.signals import Interrupt

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_flag_inside_the_block_only(number):
  before = signal.getsignal(number)
  interrupt = Interrupt()
  with interrupt.listening():
    assert not interrupt
    os.kill(os.getpid(), number)
    assert interrupt
    assert interrupt.name == number.name
  assert signal.getsignal(number) is before
  assert not Interrupt()


def test_handlers_return_after_an_error():
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(KeyError), Interrupt().listening():
    raise KeyError
  assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_may_train_too():
  """Only the main thread can handle signals; others leave them alone."""
  before = signal.getsignal(signal.SIGTERM)
  found = []

  def work():
    with Interrupt().listening():
      found.append(signal.getsignal(signal.SIGTERM))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [before]


def test_the_second_signal_leaves_at_once():
  script = (
    'import os, signal\n'
    'from trainers.signals import Interrupt\n'
    'with Interrupt().listening():\n'
    '  os.kill(os.getpid(), signal.SIGINT)\n'
    '  print("still here", flush=True)\n'
    '  os.kill(os.getpid(), signal.SIGTERM)\n'
    '  print("never")\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout.split('\n') == ['still here', '']
  assert done.returncode == 128 + signal.SIGTERM
