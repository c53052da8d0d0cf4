"""When a run has collapsed: by nats and with patience, where a detector must tell at once. Knows losses only."""

import math

_SMOOTHED = 10  # steps that the loss is averaged over before it is judged


class Collapse:
    """Tells from training losses when they have risen for good; knows nothing of the rest of the run.

    Args:
        lowest: Of the smoothed loss before; a restart is measured by what its trunk had reached.
        collapsed: Nats of the smoothed loss above its lowest, from which on it is one.
        sound: Nats above it up to which the loss counts as about as low as ever.

    Attributes:
        lowest: Of the smoothed loss so far.
        sound_until: The last step at which the smoothed loss was about as low as ever.
    """

    def __init__(self, lowest: float = math.inf, *, collapsed: float = 0.5, sound: float = 0.15) -> None:
        self.lowest, self._collapsed, self._sound = lowest, collapsed, sound
        self.sound_until = 0
        self._recent: list[float] = []

    def sees(self, step: int, loss: float) -> bool:
        """Whether the loss of a step makes it a collapse."""
        self._recent = [*self._recent, loss][-_SMOOTHED:]
        smoothed = sum(self._recent) / len(self._recent)
        if len(self._recent) == _SMOOTHED:
            self.lowest = min(self.lowest, smoothed)
        if smoothed <= self.lowest + self._sound:
            self.sound_until = step
        # written so that NaN is a collapse
        return not smoothed <= self.lowest + self._collapsed and len(self._recent) == _SMOOTHED
