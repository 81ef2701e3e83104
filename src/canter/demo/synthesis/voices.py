"""The synthetic speakers: espeak-ng variants crossed with dialect, pitch and pitch range.

Each of these variants was understood by Whisper tiny.en when it read English; whispering, croaking, echoing
and robotic ones are left out. The unseen speakers of the test part use *other variants* than every training
speaker (other formants and voicing, some another synthesis method), in the same dialects. They are still
one synthesiser with one set of pronunciation rules: unseen here means far less than it does for people.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

DIALECTS = {"en": ("en-us", "en-gb-x-rp"), "es": ("es", "es-419")}

TRAINING_VARIANTS = (
    "", "m1", "m2", "m3", "m4", "m6", "m7", "f1", "f2", "f4", "Alex", "Annie", "Denis", "Gene", "Hugo",
    "Mario", "Michael", "Mike", "Storm", "adam", "aunty", "benjamin", "edward", "gustave", "iven2", "iven4",
    "klatt", "klatt2", "klatt4", "linda", "max", "michel", "mike2",
)  # fmt: skip
UNSEEN_VARIANTS = ("m5", "m8", "f3", "f5", "Reed", "caleb", "david", "grandma", "grandpa", "john", "marcelo")
PITCHES = {"training": (38, 50, 62), "unseen": (44, 56)}


@dataclass(frozen=True)
class Voice:
    """One speaker of one language; `pitch` and `pitch_range` are espeak's (0 to 99), `rate` is words a
    minute."""

    language: str
    dialect: str
    variant: str
    pitch: int
    pitch_range: int
    rate: int

    @property
    def name(self) -> str:
        """What espeak calls it."""
        return f"{self.dialect}+{self.variant}" if self.variant else self.dialect

    @property
    def id(self) -> str:
        """The speaker of the manifests."""
        return f"{self.name}/p{self.pitch}"


@cache
def voices(language: str, *, unseen: bool) -> tuple[Voice, ...]:
    """The training or the unseen speakers of a language, in a fixed order (the same on every machine)."""
    part = "unseen" if unseen else "training"
    rng = np.random.default_rng([sum(language.encode()), unseen])
    result = []
    for variant in UNSEEN_VARIANTS if unseen else TRAINING_VARIANTS:
        for dialect in DIALECTS[language]:
            result.append(
                Voice(
                    language,
                    dialect,
                    variant,
                    pitch=int(rng.choice(PITCHES[part])),
                    pitch_range=int(rng.integers(35, 66)),
                    rate=int(rng.integers(150, 186)),
                )
            )
    return tuple(result)
