"""Signals are received immediately, whatever the main thread does."""

import os
import signal
import threading

import pytest

from wqmix_jax.runs import signals
from wqmix_jax.runs.signals import StopSignals


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Records what would have ended the process: words, then the exit code."""
    calls: list[object] = []
    monkeypatch.setattr(signals.os, "_exit", lambda code: calls.append(code))
    return calls


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def wait_until(condition: threading.Event) -> None:
    assert condition.wait(20)


def heard(ended: list[object], event: threading.Event) -> StopSignals:
    """Signals that set ``event`` when the process would end."""
    return StopSignals(lambda: (ended.append("reported"), event.set())[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_at_once(
    number: signal.Signals, code: int, ended: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "ONE_SIGNAL", 0.0)
    event = threading.Event()
    with heard(ended, event) as stopping:
        send(number)
        while stopping.received is None:
            pass
        assert stopping.received == number
        assert ended == []
        send(number)
        wait_until(event)
    assert ended == ["reported", code]


def test_a_signal_that_comes_twice_at_once_counts_as_one(ended: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """As from ``timeout``, which signals the process and then its group."""
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    event = threading.Event()
    with heard(ended, event) as stopping:
        send(signal.SIGTERM)
        while stopping.received is None:
            pass
        now[0] = 0.9
        send(signal.SIGTERM)
        assert not event.wait(0.2)
        now[0] = 1.1
        send(signal.SIGTERM)
        wait_until(event)
    assert ended == ["reported", 143]


def test_while_there_is_nothing_to_save_the_first_does(ended: list[object]) -> None:
    event = threading.Event()
    with heard(ended, event) as stopping, stopping.immediate():
        send(signal.SIGTERM)
        wait_until(event)
    assert ended == ["reported", 143]


def test_afterwards_signals_are_what_they_were() -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with StopSignals(lambda: None):
        assert [signal.getsignal(number) for number in signals.SIGNALS] != before
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
