"""Train and run attention encoder-decoder speech models efficiently.

    model = canter.load("openai/whisper-tiny.en")
    print(model.transcribe("talk.mp4").text)

Importing canter imports neither torch nor NumPy; each name below is imported when it is first used.
"""

# pyright: strict

from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from canter.api import build_index, load, measure_budget, score, train
    from canter.corpus.index import LengthIndex
    from canter.errors import CanterError
    from canter.inference.recognizer import LanguageDetection, Recognizer, Transcript
    from canter.inference.transcript.segments import Segment, Word
    from canter.inference.transcript.vad import VadOptions
    from canter.planning import Budget, Plan, analytic_budget
    from canter.planning.sampler import PlanSampler
    from canter.training.config import TrainConfig

__all__ = [
    "Budget",
    "CanterError",
    "LanguageDetection",
    "LengthIndex",
    "Plan",
    "PlanSampler",
    "Recognizer",
    "Segment",
    "TrainConfig",
    "Transcript",
    "VadOptions",
    "Word",
    "__version__",
    "analytic_budget",
    "build_index",
    "load",
    "measure_budget",
    "score",
    "train",
]

if not TYPE_CHECKING:  # type checkers report names that are not in __all__
    from importlib import import_module

    from canter.extras import needed_by

    _MODULES = {
        "Budget": "canter.planning",
        "CanterError": "canter.errors",
        "LanguageDetection": "canter.inference.recognizer",
        "LengthIndex": "canter.corpus.index",
        "Plan": "canter.planning",
        "PlanSampler": "canter.planning.sampler",
        "Recognizer": "canter.inference.recognizer",
        "Segment": "canter.inference.transcript.segments",
        "TrainConfig": "canter.training.config",
        "Transcript": "canter.inference.recognizer",
        "VadOptions": "canter.inference.transcript.vad",
        "Word": "canter.inference.transcript.segments",
        "analytic_budget": "canter.planning",
        "build_index": "canter.api",
        "load": "canter.api",
        "measure_budget": "canter.api",
        "score": "canter.api",
        "train": "canter.api",
        "load_model": "canter.loading",  # of 0.1, for what still uses it
    }

    def __getattr__(name: str):
        if name not in _MODULES:
            raise AttributeError(f"module 'canter' has no attribute {name!r}")
        with needed_by(f"canter.{name}"):
            value = getattr(import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
