"""Count the seconds of audio that are decoded, while rows are still under way."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Decoded:
    """Seconds of audio decoded so far, of which some belong to utterances that are not finished."""

    seconds: float


class Stretch(Protocol):
    """One piece of an utterance."""

    @property
    def utterance(self) -> int: ...
    @property
    def number(self) -> int: ...
    @property
    def start(self) -> float:
        """Seconds from the start of the utterance."""
        ...

    @property
    def seconds(self) -> float: ...


class Tally:
    """Adds up what is decoded; it never goes back, and ends at the sum of the utterances' stated ``durations``."""

    def __init__(self, durations: Sequence[float]):
        self.durations = durations
        self._finished: set[int] = set()
        self._whole = 0.0  # their seconds
        self._pieces: dict[int, dict[int, tuple[float, float]]] = {}  # end in seconds and fraction, by number
        self._most = 0.0

    def add(self, piece: Stretch, fraction: float = 1.0) -> None:
        """Note how far a piece is; pieces of an utterance that is finished count no more."""
        if piece.utterance in self._finished:
            return
        pieces = self._pieces.setdefault(piece.utterance, {})
        if pieces.get(piece.number, (0.0, 0.0))[1] < 1:
            pieces[piece.number] = piece.start + piece.seconds, fraction

    def finish(self, utterance: int) -> None:
        """Note that an utterance is finished, or has failed."""
        self._pieces.pop(utterance, None)
        self._finished.add(utterance)
        self._whole += self.durations[utterance]

    def decoded(self, underway: Iterable[tuple[Stretch, float]] = ()) -> Decoded:
        """Return what is decoded, with the pieces that are ``underway`` and the fraction of each.

        A piece stands for the pause before it too, and not for what overlaps with the piece before.
        """
        for piece, fraction in underway:
            self.add(piece, fraction)
        seconds = self._whole
        for utterance, pieces in self._pieces.items():
            done = before = 0.0
            for number in sorted(pieces):
                end, fraction = pieces[number]
                done += (end - before) * fraction
                before = end
            seconds += min(done, self.durations[utterance])
        self._most = max(self._most, seconds)
        return Decoded(self._most)
