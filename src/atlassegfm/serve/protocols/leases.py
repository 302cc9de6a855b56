"""Places of clients: few at a time, each until it is given back, idle for long, or its program is gone."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Content = TypeVar("Content")


class FullError(Exception):
    """All places are taken."""


class GoneError(Exception):
    """The place has been given to others, or was never taken."""


@dataclass
class Lease(Generic[Content]):
    """One place; whoever works on its content holds the lock."""

    used: float
    seen: float
    content: Content | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    working: int = 0


class Leases(Generic[Content]):
    """Places by token.

    ``idle_seconds`` after the last request that did something a place is free again, and ``silent_seconds`` after the
    last of any kind; not while something is worked on there.
    """

    def __init__(
        self,
        most: int = 4,
        idle_seconds: float = 600.0,
        silent_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most, self.idle_seconds, self.silent_seconds = most, idle_seconds, silent_seconds
        self._clock, self._lock = clock, threading.Lock()
        self._leases: dict[str, Lease[Content]] = {}

    def claim(self) -> str:
        """Take a place; FullError if there is none."""
        with self._lock:
            self._reap()
            if len(self._leases) >= self.most:
                raise FullError
            token = secrets.token_urlsafe(24)
            self._leases[token] = Lease(self._clock(), self._clock())
            return token

    def get(self, token: str, *, acts: bool = False) -> Lease[Content]:
        """Look a place up; GoneError if it is not there. What ``acts`` counts against idleness."""
        with self._lock:
            self._reap()
            lease = self._leases.get(token)
            if lease is None:
                raise GoneError
            lease.seen = self._clock()
            if acts:
                lease.used = self._clock()
            return lease

    def remaining_seconds(self, token: str) -> float:
        """Tell how long a place stays if nothing is done; GoneError if it is not there."""
        lease = self.get(token)
        return max(0.0, lease.used + self.idle_seconds - self._clock())

    def release(self, token: str) -> None:
        """Give a place back, if it is there."""
        with self._lock:
            self._leases.pop(token, None)

    def begin(self, lease: Lease[Content]) -> None:
        """Note that something is worked on at a place."""
        with self._lock:
            lease.working += 1

    def end(self, lease: Lease[Content]) -> None:
        """Note that it is done."""
        with self._lock:
            lease.working -= 1
            lease.used = lease.seen = self._clock()

    def _reap(self) -> None:
        now = self._clock()
        for token, one in list(self._leases.items()):
            left = now - one.used > self.idle_seconds or now - one.seen > self.silent_seconds
            if left and not one.working:
                del self._leases[token]
