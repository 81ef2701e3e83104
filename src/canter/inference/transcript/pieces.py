"""Long audio cut into pieces that a model can take, where nobody speaks if possible.

Audio comes in runs and pieces go out as they are found, so a file of hours needs the memory of a few
windows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from canter.inference.transcript.vad import FRAME, RATE, Detector

MARGIN = 0.3  # seconds around speech that are kept, so that pauses of twice as much part it
BREATH = 0.12  # seconds of no speech within which audio can be cut without an overlap
SILENCE = 5.0  # seconds of no speech that no piece goes on over
LEFT_OUT = 2.0  # seconds of no speech at the ends of audio that fits the window, from which they are left out
AT_LEAST = 0.5  # share of the window that a piece should fill


@dataclass(frozen=True)
class Piece:
    """A stretch of audio that is decoded on its own."""

    start: float
    """Seconds from the start of the whole."""
    samples: np.ndarray  # (S,) float32
    overlap: float = 0.0
    """Seconds at its start that the piece before has too: there was no pause to cut in."""
    goes_on: bool = False
    """Whether the next piece has its end too."""
    rate: int = RATE
    voiced: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """(F,) whether somebody speaks, in frames of FRAME seconds; empty where that is not known."""

    @property
    def end(self) -> float:
        return self.start + len(self.samples) / self.rate


def cut(
    blocks: Iterable[np.ndarray],
    detector: Detector | None,
    window: float = 30.0,
    overlap: float = 3.0,
    rate: int = RATE,
) -> Iterator[Piece]:
    """Audio (S,) at ``rate``, in blocks of any size -> pieces of at most ``window`` seconds, in order.

    What lies between stretches of speech is left out where it lasts more than a moment (without a
    ``detector`` nothing is). Speech without a pause is cut within a breath, and where there is none at the end
    of the window; the next piece then begins ``overlap`` seconds before.
    """
    most, size, margin = round(window / FRAME), round(FRAME * rate), round(MARGIN / FRAME)
    lap = round(min(overlap, window / 2) / FRAME)
    rest, done, carried = np.zeros(0, np.float32), 0, 0  # frames that are settled, and that come twice
    blocks, more = _divided(blocks, most * size), True
    while more or len(rest):
        pending = [rest]
        while more and sum(map(len, pending)) < 2 * most * size:  # what is looked at together
            block = next(blocks, None)
            more = block is not None
            pending += [] if block is None else [block]
        rest = np.concatenate(pending)
        seen = rest[: 2 * most * size]
        further = more or len(rest) > len(seen)
        frames = -(-len(seen) // size)
        raw = np.ones(frames, bool) if detector is None else detector(seen) > 0.5
        speech = np.convolve(raw, np.ones(2 * margin + 1))[margin : margin + frames] > 0.5 if frames else raw
        voiced = np.flatnonzero(speech)
        begin = int(voiced[0]) if len(voiced) else frames
        if carried and begin * FRAME < SILENCE:  # the piece before went on without a pause
            begin = 0
        carried = max(0, carried - begin)
        late = further and begin + most > frames  # a whole window from there on is not known yet
        end, again = (begin, 0) if late or begin == frames else _end(speech, raw, begin, most, lap, further)
        if end > begin:
            samples = seen[begin * size : end * size]
            shared = min(carried * size, len(samples)) / rate
            voiced = _known(raw[begin:end])
            # A copy: a view would keep all of what is looked at together in memory for as long as the piece.
            yield Piece((done + begin) * size / rate, samples.copy(), shared, again > 0, rate, voiced)
        # The start of a word may lie within the margin at the end of what is known.
        settled = end - again if begin < frames else max(0, frames - margin) if further else frames
        if not further and not speech[end:].any():  # heard with all before it: alone it may pass for speech
            settled = frames
        rest, done, carried = rest[settled * size :], done + settled, again


def _divided(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield the same samples in blocks of at most ``size``: what is left of a block is copied with every piece, so the
    time for one of hours would grow with its square."""
    for block in blocks:
        for start in range(0, len(block), size):
            yield block[start : start + size]


def trimmed(samples: np.ndarray, detector: Detector | None, window: float, rate: int = RATE) -> list[Piece]:
    """Audio (S,) that fits the ``window`` -> its pieces: none where nobody speaks, usually one, more where nobody
    speaks for a while in between. At its ends no speech is left out below LEFT_OUT seconds."""
    if detector is None:
        return [Piece(0.0, samples, rate=rate)]
    found = list(cut([samples], detector, window, 0.0, rate))
    if found and found[0].start < LEFT_OUT:
        found[0] = _widened(found[0], samples, 0.0, found[0].end)
    if found and len(samples) / rate - found[-1].end < LEFT_OUT:
        found[-1] = _widened(found[-1], samples, found[-1].start, len(samples) / rate)
    return found


def _widened(piece: Piece, samples: np.ndarray, start: float, end: float) -> Piece:
    """Return the piece with more of the samples around it, in which nobody speaks."""
    first, last = round(start * piece.rate), round(end * piece.rate)
    voiced = piece.voiced
    if len(voiced):
        size = round(FRAME * piece.rate)
        before = (round(piece.start * piece.rate) - first) // size
        after = -(-(last - first) // size) - before - len(voiced)
        voiced = np.pad(voiced, (before, max(0, after)))
    return replace(piece, start=start, samples=samples[first:last], voiced=voiced)


def _known(raw: np.ndarray) -> np.ndarray:
    """Return the frames with speech; none where the detector could not tell, and took all for speech."""
    return np.zeros(0, bool) if raw.all() else raw.copy()


def _end(speech: np.ndarray, raw: np.ndarray, begin: int, most: int, lap: int, more: bool) -> tuple[int, int]:
    """Where a piece from frame ``begin`` on ends, and how many of its frames the next one takes again.
    speech (F,) has its margins, ``raw`` has none; ``more``: whether audio comes after F."""
    limit = min(begin + most, len(speech))
    gap_ends = np.flatnonzero(np.diff(np.r_[speech[begin:limit], True].astype(int)) == 1) + begin + 1
    gaps = [(begin + _run_before(~speech[begin:gap_end]), gap_end) for gap_end in gap_ends.tolist()]
    for start, stop in gaps:
        if (stop - start) * FRAME >= SILENCE:
            return start, 0
    if limit == len(speech) and not more:
        return (gaps[-1][0] if gaps and gaps[-1][1] == limit else limit), 0
    enough = begin + round(AT_LEAST * most)
    if gaps and gaps[-1][0] >= enough:
        return gaps[-1][0], 0
    breath = max(1, round(BREATH / FRAME))
    quiet = ~raw[enough:limit]
    still = np.convolve(quiet, np.ones(breath), mode="valid") > breath - 0.5 if len(quiet) >= breath else quiet[:0]
    if still.any():
        return enough + int(np.flatnonzero(still)[-1]) + breath // 2, 0
    if gaps and gaps[-1][0] > begin:
        return gaps[-1][0], 0
    return limit, lap


def _run_before(mask: np.ndarray) -> int:
    """Where the run of true values begins with which ``mask`` ends."""
    (other,) = np.flatnonzero(~mask)[-1:] if (~mask).any() else (-1,)
    return int(other) + 1
