"""The number of steps of a run that was given minutes: estimated from the budget, then from the steps taken."""

from canter.training.config import TrainConfig

UNTIMED = 10  # first steps, which wait for workers to start
# Fractions of the run at which its steps are estimated once more.
LATER = (*(percent / 100 for percent in range(35, 100, 5)), 0.975)


class Pace:
    """Estimate the number of steps again on the way: early on, after the CTC-only warm-up, and often from there on.

    With data decoded beside it and other work on the machine, a step takes longer than in a probe; and a machine may
    become slower or faster at any time.
    """

    def __init__(self, config: TrainConfig, mean_seconds: float, settled: int = 0):
        """``mean_seconds`` of a step as the budget has it; ``settled``: how often that was done already."""
        self.config, self.mean_seconds, self.settled = config, mean_seconds, settled
        self.timed: list[tuple[float, float]] = []  # seconds of each step, as predicted and as taken
        self.at: int | None = None
        """The step after which steps are settled next; None where their number stands."""

    def plan(self, step: int, steps: int) -> None:
        """Chooses when to settle next, for a run at ``step`` of ``steps``."""
        shares = sorted({0.02, (self.config.loss.ctc_warmup or 0.0) + 0.08, *LATER})
        if self.config.minutes is None or self.config.steps is not None or self.settled >= len(shares):
            self.at = None
        else:
            self.at = max(step + 2 * UNTIMED, round(shares[self.settled] * steps))

    def took(self, predicted: float, seconds: float) -> None:
        if self.at is not None:
            self.timed.append((predicted, seconds))

    def steps(self, step: int, steps: int, seconds: float) -> int:
        """The number of steps that fits the minutes, for a run that has spent ``seconds`` on ``step`` steps."""
        recent = self.timed[UNTIMED:][-max(UNTIMED, steps // 20) :]
        predicted, taken = map(sum, zip(*recent, strict=True))
        left = (self.config.minutes or 0) * 60 - seconds
        mean = self.mean_seconds * taken / max(predicted, 1e-9)
        self.settled += 1
        return step + max(1, round(left / mean))
