"""Division of long audio into chunks that fit the model's window, in pauses if possible.

Audio arrives in blocks and chunks leave as they are found, so a file of hours needs the memory of a few windows.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from canter.inference.transcript.vad import FRAME, RATE, USUAL_VAD, Detector, VadOptions

BREATH = 0.12  # minimum seconds without speech to divide audio there without an overlap
SILENCE = 5.0  # seconds without speech and its padding that end every chunk, by default
MIN_TRIM = 2.0  # minimum seconds to trim from the ends of audio that fits the window, by default
MIN_FILL = 0.5  # minimum fraction of the window that a chunk should fill


@dataclass(frozen=True)
class Chunk:
    """Span of audio that is decoded by itself."""

    start: float
    """Seconds from the start of the recording."""
    samples: np.ndarray  # (S,) float32
    overlap: float = 0.0
    """Seconds at its start that the chunk before contains too, for want of a pause."""
    ends_in_speech: bool = False
    """True where the next chunk overlaps with its end."""
    rate: int = RATE
    voiced: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """(F,) True for speech, in frames of FRAME seconds; empty if unknown."""
    channel: int | None = None
    """Channel of the recording, from 0, where every channel is transcribed by itself."""

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate

    @property
    def end(self) -> float:
        return self.start + self.seconds


def split_audio(
    blocks: Iterable[np.ndarray],
    detector: Detector | None,
    window: float = 30.0,
    overlap: float = 3.0,
    rate: int = RATE,
    options: VadOptions = USUAL_VAD,
) -> Iterator[Chunk]:
    """Yield audio (S,), given in blocks of any size, in chunks of at most ``window`` seconds, in order.

    Audio between spans of speech is omitted where it lasts more than a moment; without a ``detector`` nothing is.
    Speech without a pause is divided within a breath, or else at the end of the window, and then the next chunk begins
    ``overlap`` seconds earlier.
    """
    most, size = round(window / FRAME), round(FRAME * rate)
    margin = min(round(options.padding_seconds / FRAME), most)
    least, silence = round(options.min_speech_seconds / FRAME), options.least_gap(SILENCE, 2)
    lap = round(min(overlap, window / 2) / FRAME)
    ahead, done, carried = np.zeros(0, np.float32), 0, 0  # frames that are finished, and that the next chunk repeats
    blocks, more = _divided(blocks, most * size), True
    while more or len(ahead):
        pending = [ahead]
        while more and sum(map(len, pending)) < 2 * most * size:
            block = next(blocks, None)
            more = block is not None
            pending += [] if block is None else [block]
        ahead = np.concatenate(pending)
        seen = ahead[: 2 * most * size]
        further = more or len(ahead) > len(seen)
        frames = -(-len(seen) // size)
        raw = np.ones(frames, bool) if detector is None else detector(seen) > options.threshold
        speech = np.convolve(raw, np.ones(2 * margin + 1))[margin : margin + frames] > 0.5 if frames else raw
        if least:
            _drop_short(raw, speech, least, begun=carried > 0, more=further)
        voiced = np.flatnonzero(speech)
        begin = int(voiced[0]) if len(voiced) else frames
        if carried and begin * FRAME < silence:  # the chunk before ended without a pause
            begin = 0
        carried = max(0, carried - begin)
        late = further and begin + most > frames  # a complete window from there on is not known yet
        end, again = (begin, 0) if late or begin == frames else _end(speech, raw, begin, most, lap, further, silence)
        if end > begin:
            samples = seen[begin * size : end * size]
            shared = min(carried * size, len(samples)) / rate
            voiced = _known(raw[begin:end])
            # A view would keep both windows in memory as long as the chunk.
            yield Chunk((done + begin) * size / rate, samples.copy(), shared, again > 0, rate, voiced)
        # The start of a word may lie within the margin at the end of what is known.
        finished = end - again if begin < frames else max(0, frames - margin) if further else frames
        if not further and not speech[end:].any():  # analysed separately it might pass for speech
            finished = frames
        ahead, done, carried = ahead[finished * size :], done + finished, again


def clipped(blocks: Iterable[np.ndarray], bounds: Sequence[float], rate: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield what lies in spans of audio (S,), given in blocks, with the number of the span.

    ``bounds`` are the starts and ends of the spans in increasing seconds; without an end the last span is open.
    """
    ends = [*bounds[1::2], math.inf][: (len(bounds) + 1) // 2]
    place = 0
    for block in blocks:
        for number, (start, end) in enumerate(zip(bounds[::2], ends)):
            first = max(round(start * rate), place)
            last = place + len(block) if end == math.inf else min(round(end * rate), place + len(block))
            if first < last:
                yield number, block[first - place : last - place]
        place += len(block)


def _divided(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield the samples in blocks of at most ``size``: the remainder of a block is copied with every chunk, so that a
    block of hours would take quadratic time."""
    for block in blocks:
        for start in range(0, len(block), size):
            yield block[start : start + size]


def _drop_short(raw: np.ndarray, speech: np.ndarray, least: int, begun: bool, more: bool) -> None:
    """Remove spans of speech of less than ``least`` frames from ``raw`` (F,) and, with margins, ``speech`` (F,), in
    place.

    A span at the start is kept if it has ``begun`` before, and one at the end if ``more`` audio follows.
    """
    edges = np.diff(np.r_[0, speech.astype(int), 0])
    for first, end in zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist()):
        places = np.flatnonzero(raw[first:end])
        unknown = (first == 0 and begun) or (end == len(speech) and more)
        if not unknown and (not len(places) or places[-1] - places[0] + 1 < least):
            raw[first:end] = speech[first:end] = False


def trim_silence(
    samples: np.ndarray, detector: Detector | None, window: float, rate: int = RATE, options: VadOptions = USUAL_VAD
) -> list[Chunk]:
    """Return the chunks of audio (S,) that fits the ``window``: none without speech, usually one, several with a long
    silence in between. Silence that is shorter than ``options`` say, by default MIN_TRIM, is kept at the ends."""
    least = options.least_gap(MIN_TRIM, 1)
    if detector is None:
        return [Chunk(0.0, samples, rate=rate)]
    found = list(split_audio([samples], detector, window, 0.0, rate, options))
    if found and found[0].start < least:
        found[0] = _widened(found[0], samples, 0.0, found[0].end)
    if found and len(samples) / rate - found[-1].end < least:
        found[-1] = _widened(found[-1], samples, found[-1].start, len(samples) / rate)
    return found


def _widened(chunk: Chunk, samples: np.ndarray, start: float, end: float) -> Chunk:
    """Return the chunk with more of the silence around it."""
    first, last = round(start * chunk.rate), round(end * chunk.rate)
    voiced = chunk.voiced
    if len(voiced):
        size = round(FRAME * chunk.rate)
        before = (round(chunk.start * chunk.rate) - first) // size
        after = -(-(last - first) // size) - before - len(voiced)
        voiced = np.pad(voiced, (before, max(0, after)))
    return replace(chunk, start=start, samples=samples[first:last], voiced=voiced)


def _known(raw: np.ndarray) -> np.ndarray:
    """Return the frames with speech; none where the detector is uncertain and takes all for speech."""
    return np.zeros(0, bool) if raw.all() else raw.copy()


def _end(
    speech: np.ndarray, raw: np.ndarray, begin: int, most: int, lap: int, more: bool, silence: float
) -> tuple[int, int]:
    """Return the end of a chunk from frame ``begin`` on, and the number of its frames that the next one repeats.

    speech (F,) has margins, ``raw`` (F,) has none; ``more``: audio follows after F; ``silence``: seconds that end every
    chunk.
    """
    limit = min(begin + most, len(speech))
    gap_ends = np.flatnonzero(np.diff(np.r_[speech[begin:limit], True].astype(int)) == 1) + begin + 1
    gaps = [(begin + _run_before(~speech[begin:gap_end]), gap_end) for gap_end in gap_ends.tolist()]
    for start, stop in gaps:
        if (stop - start) * FRAME >= silence:
            return start, 0
    if limit == len(speech) and not more:
        return (gaps[-1][0] if gaps and gaps[-1][1] == limit else limit), 0
    enough = begin + round(MIN_FILL * most)
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
    """Return the start of the run of true values at the end of ``mask``."""
    (other,) = np.flatnonzero(~mask)[-1:] if (~mask).any() else (-1,)
    return int(other) + 1
