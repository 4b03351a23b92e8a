"""Where new weights may come between two tokens of the embedded engine."""

from __future__ import annotations

import threading


class Gate:
    """Lets one thread decode and others hold it between two tokens."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._holds = 0
        self._is_decoding = False

    def enter(self) -> None:
        """The decoding thread, before it computes; waits while anyone holds the gate."""
        with self._condition:
            self._condition.wait_for(lambda: not self._holds)
            self._is_decoding = True

    def leave(self) -> None:
        """The decoding thread, between two tokens and at the end."""
        with self._condition:
            self._is_decoding = False
            self._condition.notify_all()

    def hold(self) -> None:
        """Keep the decoding thread out; on return it computes nothing."""
        with self._condition:
            self._holds += 1
            self._condition.wait_for(lambda: not self._is_decoding)

    def release(self) -> None:
        with self._condition:
            self._holds -= 1
            self._condition.notify_all()
