"""Drafts: texts that rows may turn out to have, so that one step of the decoder can check several tokens.

A step reads a row's last token and the next tokens of its draft, and predicts a token after each. Those that agree with
the draft, and the first one that does not, are what the decoder would have written one at a time (Stern et al., 2018,
"Blockwise parallel decoding"; Leviathan et al., 2023, "Fast inference from Transformers via speculative decoding"). So
a draft changes the number of steps and never the text.

K: tokens of a row in a step.
"""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from canter.errors import ConfigError
from canter.inference.engine.ctc import spelling_of
from canter.inference.engine.requests import Hypothesis, Request
from canter.models.model import SpeechModel

WIDTHS = (1, 2, 4, 8, 16)
"""Values of K to choose from; a wider step that is not faster shows that none is."""
MEASURED = 2  # times of a step after which it counts as measured
KEPT = 4  # latest times of a step
COLUMNS = 16  # latest times of a further token, the shortest of which says what to expect of other steps
REVISIT = 256  # steps after which a value of K is measured again that looked slower; more if it looked much slower
HOLD = 3  # further steps for which a choice holds, which takes as long as a tenth of a small step
USELESS, PAUSE = 16, 256  # choices of K = 1 after which rows have no draft, and the number of these rows
REMEMBERED = 1000  # tokens after which older ones count half
USUAL_TOKENS = 20.0  # weight of the expected number of tokens
USUAL_ACCEPTANCE, PRIOR = 0.8, 4.0  # of a drafted token, and its weight as a number of tokens
SMALL_HEAD = 1024  # outputs of a CTC head whose cost does not count


class Drafter(Protocol):
    """Writer of drafts, such as the engine of a smaller model with the same tokenizer."""

    def decode(self, requests: list[Request]) -> list[Hypothesis]:
        """Return a hypothesis for each request, in their order."""
        ...


class Draft:
    """Draft of one row, aligned with what the row has written.

    Where the row writes another token than the draft has, the draft continues at the place whose text before it has the
    least edit distance to the row's.
    """

    def __init__(self, tokens: Sequence[int]):
        self.tokens = list(tokens)
        self.place = 0
        """Number of tokens of the draft that correspond to what is written; after a token that the draft does not have
        next, an estimate until `following` looks for the place."""
        self.accepted = 0
        self.rejected = 0
        self._ids = np.array(self.tokens, dtype=np.int64)
        self._ramp = np.arange(len(self.tokens) + 1)
        self._distances = self._ramp  # from what was written, before ``_pending``, to each beginning of the draft
        self._pending: list[int] = []
        self._lost = False

    def following(self, count: int) -> list[int]:
        """Return the next tokens of the draft, at most ``count``."""
        if self._lost:
            self._align()
        return self.tokens[self.place : self.place + count]

    def took(self, tokens: Sequence[int], offered: int) -> None:
        """Record the next tokens that the row has written, of which all but the last were among ``offered`` ones."""
        self.accepted += len(tokens) - 1
        self.rejected += len(tokens) - 1 < offered
        for token in tokens:
            self._lost = self._lost or self.tokens[self.place : self.place + 1] != [token]
            self.place += 1
        self._pending += tokens

    def _align(self) -> None:
        for token in self._pending:
            here = self._distances + 1
            np.minimum(here[1:], self._distances[:-1] + (self._ids != token), out=here[1:])
            self._distances = np.minimum.accumulate(here - self._ramp) + self._ramp
        last, expected = self._pending[-1], self.place
        self._pending, self._lost = [], False
        nearest = np.flatnonzero(self._distances == self._distances.min()).tolist()
        same = [place for place in nearest if place and self.tokens[place - 1] == last]
        self.place = min(same or nearest, key=lambda place: (abs(place - expected), -place))


class StepWidths:
    """Choice of K, the number of tokens of a row in a step: the one with the most tokens a second, by the measured
    times of steps and the accepted fraction of drafts. The text does not depend on it."""

    def __init__(self, widths: Sequence[int] = WIDTHS, fixed: int | None = None):
        """Choose among ``widths``, of which 1 is one; or always choose the ``fixed`` one."""
        self.widths, self.fixed = sorted(widths), fixed
        self.accepted, self.tried = USUAL_ACCEPTANCE * PRIOR, PRIOR
        # by rows, rounded up to a power of two, and K
        self._times: defaultdict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._counts: defaultdict[tuple[int, int], int] = defaultdict(int)  # of all times
        self._steps: defaultdict[int, int] = defaultdict(int)  # of as many rows
        self._latest: defaultdict[tuple[int, int], int] = defaultdict(int)  # step of the latest time
        self._columns: deque[float] = deque(maxlen=COLUMNS)  # seconds of a further token of a row
        self._held = (0, 1, 0)  # rows, K, and the number of further steps for which it holds
        # by K: tokens that steps gave, and that they were expected to give
        self._given = dict.fromkeys(self.widths, USUAL_TOKENS)
        self._expected = dict.fromkeys(self.widths, USUAL_TOKENS)
        self._next = dict.fromkeys(self.widths, 0.0)  # tokens expected of the next step
        self._narrow = 0  # latest choices that were K = 1
        self._pause = 0  # rows that are to have no draft

    @property
    def active(self) -> bool:
        """True unless drafts have not paid lately."""
        return not self._pause

    def enters(self) -> bool:
        """Return whether the next row is to have a draft. After many steps in which none paid, some rows have none."""
        self._pause = max(0, self._pause - 1)
        return self.active

    def choose(self, drafts: Sequence[Draft | None]) -> int:
        """Return K for the next step of rows with these drafts; None: a row without one."""
        if self.fixed:
            return self.fixed
        rows, width, steps = self._held
        if rows == len(drafts) and steps:
            self._held = rows, width, steps - 1
            return width
        width, decided = self._best(drafts)
        self._held = len(drafts), width, HOLD if decided else 0
        self._narrow = self._narrow + 1 if width == 1 and decided else 0
        if self._narrow == USELESS:
            self._narrow, self._pause = 0, PAUSE
        return width

    def _best(self, drafts: Sequence[Draft | None]) -> tuple[int, bool]:
        """Return K, and whether it is the fastest, rather than one to measure."""
        left = np.array([max(0, len(one.tokens) - one.place) if one else 0 for one in drafts])
        if not left.any():
            return 1, False
        rate, size = self.accepted / self.tried, _rounded(len(drafts))
        accepted = np.array([one.accepted if one else 0 for one in drafts]) + rate * PRIOR
        rejected = np.array([one.rejected if one else 0 for one in drafts]) + (1 - rate) * PRIOR
        each = np.minimum(accepted / (accepted + rejected), 0.999)[:, None]
        # 1 + a + a^2 + ... of as many drafted tokens as there are
        most = np.minimum(left[:, None], np.array(self.widths) - 1)
        tokens = ((1 - each ** (most + 1)) / (1 - each)).sum(0).tolist()
        self._next = dict(zip(self.widths, tokens))
        found = [
            (count * self._given[width] / self._expected[width] / self._seconds(size, width), width)
            for width, count in self._next.items()
        ]
        best, chosen = max(found)
        for speed, width in found:
            # A time is measured again, sooner the fewer there are and the less it would cost. The first steps of all,
            # with K = 1, may have been slow.
            age = self._steps[size] - self._latest[size, width]
            wait = (8 if width == 1 else 64) * self._counts[size, width]
            if speed and age * speed > min(REVISIT, wait) * best:
                return width, False
        return chosen, len(self._times[size, chosen]) >= MEASURED

    def _seconds(self, size: int, width: int) -> float:
        """Return the seconds of a step: the shortest of the latest, else expected from those of K = 1 and other
        steps."""
        times, narrow = self._times[size, width], self._times[size, 1]
        if len(times) >= MEASURED:
            return min(times)
        if width == 1 or len(narrow) < MEASURED:  # K = 1 is measured first
            return math.inf if width > 1 else 1.0
        if not self._columns:
            return min(narrow) if width == self.widths[1] else math.inf
        return min(narrow) + min(self._columns) * size * (width - 1)

    def record(self, rows: int, width: int, seconds: float, accepted: int, rejected: int) -> None:
        """Record a step of ``rows`` rows: its time, the drafted tokens that they have accepted, and the number of rows
        that have rejected one."""
        if self.fixed:
            return
        self.accepted += accepted
        self.tried += accepted + rejected
        if self.tried > REMEMBERED:
            self.accepted, self.tried = self.accepted / 2, self.tried / 2
        size, tokens = _rounded(rows), rows + accepted
        self._given[width] += tokens
        self._expected[width] += self._next[width] or tokens
        if self._expected[width] > REMEMBERED:
            self._given[width], self._expected[width] = self._given[width] / 2, self._expected[width] / 2
        self._times[size, width].append(seconds)
        if width > 1 and self._times[size, 1]:
            self._columns.append(max(0.0, seconds - min(self._times[size, 1])) / (size * (width - 1)))
        self._steps[size] += 1
        self._counts[size, width] += 1
        self._latest[size, width] = self._steps[size]


def _rounded(rows: int) -> int:
    return 1 << (rows - 1).bit_length()


class CtcDrafts:
    """Reading of the CTC head's greedy outputs as tokens of the decoder."""

    def __init__(self, model: SpeechModel):
        """Raise ConfigError for a model without a CTC head, or whose outputs have an unknown meaning."""
        self.spelling = spelling_of(model, "--draft ctc")
        self.tokenizer, self.characters = model.tokenizer, model.characters
        self.languages = dict[int, str]()
        if self.tokenizer and len(self.tokenizer.languages) > 1:
            self.languages = {self.tokenizer.special_id(f"<|{name}|>"): name for name in self.tokenizer.languages}

    def tokens(self, outputs: Sequence[int], prompt: Sequence[int]) -> list[int]:
        """Return collapsed CTC outputs as tokens, in the language that the prompt asks for."""
        if self.characters is None or self.tokenizer is None:
            return [token for token in outputs if self.spelling.symbols[token]]
        named = [self.languages[token] for token in prompt if token in self.languages]
        try:
            return self.tokenizer.encode(self.characters.decode(outputs).strip(), named[-1] if named else None)
        except ConfigError:  # a language without a vocabulary
            return []


def ctc_drafts(model: SpeechModel, asked: bool) -> CtcDrafts | None:
    """Return the reading of drafts by the model's CTC head, where it has one.

    It is used where that is ``asked``, and on a CPU where the head is small. A GPU has not been measured, and a head
    over all tokens takes about as long as it saves.

    Raises ConfigError where it is asked for and impossible.
    """
    small = model.ctc is not None and model.config.ctc_vocabulary <= SMALL_HEAD
    on_cpu = next(model.parameters()).device.type == "cpu"
    if not asked and not (small and on_cpu):
        return None
    try:
        return CtcDrafts(model)
    except ConfigError:
        if asked:
            raise
        return None
