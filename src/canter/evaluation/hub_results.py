"""Results for the Hugging Face hub: YAML files in ``.eval_results/`` of a model's repository.

The hub shows them on the model's page and on the leaderboard of the benchmark's data set. The format is that of
https://huggingface.co/docs/hub/eval-results and of ``eval_results.yaml`` in https://github.com/huggingface/hub-docs.
"""

# pyright: strict

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from canter.errors import ConfigError
from canter.evaluation.normalize import Normalization
from canter.evaluation.wer import Score
from canter.files import write_text

FOLDER = ".eval_results"
_NAME = re.compile(r"(?P<dataset>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<task>[\w-][\w.-]*))?")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the hub: its data set, and one of the tasks in the data set's ``eval.yaml``."""

    dataset: str
    task: str = "default"

    @classmethod
    def of(cls, text: str) -> Benchmark:
        """Read DATASET:TASK, or only DATASET. Raises ConfigError for anything else."""
        found = _NAME.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"--dataset {text!r:.80} is not DATASET:TASK of the Hugging Face hub, such as "
                "hf-audio/open-asr-leaderboard:ami"
            )
        return cls(found["dataset"], found["task"] or "default")

    def result(self, score: Score, normalize: Normalization, date: datetime.date) -> HubResult:
        """Return the WER of a score as a result of this benchmark. Raises ConfigError for references without words."""
        if not score.total.words:
            raise ConfigError("the references have no words, so there is no WER to publish")
        notes = (
            f"WER in %, {score.total.utterances} utterances of {score.total.words} words, "
            f"'canter score --normalize {normalize}'"
        )
        return HubResult(self, round(100 * score.total.wer, 2), date, notes)


@dataclass(frozen=True)
class HubResult:
    """A WER in percent, lower is better."""

    benchmark: Benchmark
    value: float
    date: datetime.date
    notes: str

    def yaml(self) -> str:
        """Return the file's content: a list with one entry."""
        entry = {
            "dataset": {"id": self.benchmark.dataset, "task_id": self.benchmark.task},
            "value": self.value,
            "date": self.date.isoformat(),
            "notes": self.notes,
        }
        return yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=1000)


def write_result(folder: Path, result: HubResult) -> Path:
    """Write a result into ``.eval_results/`` of a model folder, in place of one of the same task; return the file."""
    benchmark = result.benchmark
    name = f"{benchmark.dataset.replace('/', '--')}--{benchmark.task}.yaml"
    write_text(folder / FOLDER / name, result.yaml())
    return folder / FOLDER / name
