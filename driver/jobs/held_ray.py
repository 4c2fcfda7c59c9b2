"""Ray, for as long as a job needs it."""

from __future__ import annotations

from types import TracebackType


class HeldRay:
    """Connects, or starts a Ray of its own, at most once; gives it up at the latest when it is left."""

    def __init__(self, address: str | None) -> None:
        self._address, self._held = address, False

    def begin(self) -> bool:
        """From here on there is one; whether there was none before."""
        from shoal.driver.engine import hold_ray

        if self._held:
            return False
        hold_ray(self._address)
        self._held = True
        return True

    def end(self) -> None:
        """A Ray that was started for the job ends."""
        from shoal.driver.engine import release_ray

        if self._held:
            self._held = False
            release_ray()

    def __enter__(self) -> HeldRay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()
