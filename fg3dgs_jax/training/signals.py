"""How a long run is stopped: SIGTERM and SIGINT ask, the loop saves at its next step, the process exits with 75."""

import signal
from types import FrameType, TracebackType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command, run again, continues


class Stopped(Exception):
    """The run was asked to stop and has saved. The message says how far it came; commands exit with 75."""


class Interrupt:
    """Turns the first SIGTERM or SIGINT inside its `with` block into a flag that the training loop polls.

    A second signal raises KeyboardInterrupt at once, for a loop that no longer polls. Only the main thread may enter.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
