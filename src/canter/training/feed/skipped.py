"""When too much of the data turns out unusable."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from canter.corpus.index import LengthIndex
from canter.corpus.utterance import Problem
from canter.errors import CanterError
from canter.files import write_text
from canter.planning.plan import Plan
from canter.redaction import redacted
from canter.training.distributed.ranks import Ranks
from canter.training.run.reports import Progress

FEWEST = 20  # unusable utterances are allowed, whatever their share


def list_left_out(path: Path, index: LengthIndex, plan: Plan) -> int:
    """Writes a line for each utterance that the plan cannot use, with its row and the reason; returns how many."""
    lines = []
    for row, reason in plan.left_out():
        lengths = f"{index.seconds[row]:.2f} s, {index.tokens[row]} tokens"
        reason = f"{reason}: {lengths}"
        file = redacted(index.utterance(row).audio_filepath)
        lines.append({"file": file, "line": row, "reason": reason})
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return len(lines)


def list_problems(path: Path, problems: Sequence[Problem], say: Callable[[str], None]) -> None:
    """Write the validation rows that cannot be used, and say how many they are, with the first."""
    if problems:
        lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in problems)
        write_text(path, "".join(lines))
        say(f"{len(problems)} validation rows left out, listed in {path}: {problems[0]}")
    else:
        path.unlink(missing_ok=True)


def check_share(listed: Path, progress: Progress, limit: float, ranks: Ranks) -> None:
    """Raises CanterError, with what was wrong how often, where over ``limit`` of the utterances seen were unusable."""
    seen = progress.utterances + progress.skipped
    if progress.skipped <= max(FEWEST, limit * seen):
        return
    told = ranks.broadcast_object(summary(listed) if ranks.first else "")
    raise CanterError(
        f"{progress.skipped} of {seen} utterances could not be used (see {listed}): {told}; mend the manifest, or "
        "allow more with --max-skipped"
    )


def summary(listed: Path, most: int = 4) -> str:
    """The most frequent reasons of a skipped.jsonl, with how often each."""
    kinds: Counter[str] = Counter()
    with listed.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                kinds[kind_of(row["reason"], row["file"])] += 1
            except (ValueError, KeyError, TypeError, AttributeError):
                kinds["unreadable line of this list"] += 1
    parts = [f"{count} x {kind}" for kind, count in kinds.most_common(most)]
    more = len(kinds) - most
    return ", ".join(parts) + (f" and {more} other reasons" if more > 0 else "")


def kind_of(reason: str, file: str) -> str:
    """A reason without its file and numbers, the advice after it left out: 'is empty (N bytes)'."""
    bare = reason.replace(file, "").lstrip(": ").split(";")[0]
    return re.sub(r"\d+(\.\d+)?", "N", bare)[:80].strip()
