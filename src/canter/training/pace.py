"""How many steps a run has, where it was given minutes: settled by the budget, and again by the steps taken."""

from canter.training.config import TrainConfig

UNTIMED = 10  # first steps, which wait for workers to start


class Pace:
    """Settles the number of steps anew early on, and once the decoder is trained too: with data decoded beside it and
    other work on the machine, a step takes longer than in a probe."""

    def __init__(self, config: TrainConfig, mean_seconds: float, settled: int = 0):
        """``mean_seconds`` of a step as the budget has it; ``settled``: how often that was done already."""
        self.config, self.mean_seconds, self.settled = config, mean_seconds, settled
        self.timed: list[tuple[float, float]] = []  # seconds of each step, as predicted and as taken
        self.at: int | None = None
        """The step after which steps are settled next; None where their number stands."""

    def plan(self, step: int, steps: int) -> None:
        """Chooses when to settle next, for a run at ``step`` of ``steps``."""
        shares = (0.02, (self.config.loss.ctc_alone or 0.0) + 0.08)
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
