"""Stopping on request."""

import logging
import signal
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)


class StopRequest:
    """Remembers SIGTERM, SIGUSR1 or SIGINT, so that the step under way is finished first. A second
    SIGINT interrupts."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("%s: stopping after this step", signal.Signals(number).name)
