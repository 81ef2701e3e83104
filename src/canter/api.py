"""The functions of ``import canter``: models in, plans and training out. Everything they use is elsewhere."""

# pyright: strict

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from canter.errors import ConfigError

if TYPE_CHECKING:
    from canter.corpus.index import LengthIndex, Source
    from canter.corpus.manifest import Utterance
    from canter.corpus.mixture import Group
    from canter.evaluation.normalize import Normalization
    from canter.evaluation.wer import Score
    from canter.inference.recognizer import Recognizer
    from canter.models.protocol import AnyModel
    from canter.planning import Budget
    from canter.text.tokenizer import Tokenizer
    from canter.training.config import TrainConfig

Precision = Literal["auto", "float32", "bf16", "int8"]


def load(
    model: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    revision: str | None = None,
) -> Recognizer:
    """Load a speech recognition model.

    model: the folder of a training run (its best checkpoint is taken), a model folder of Canter or Hugging Face, a
        ``.nemo`` file, or a name on the Hugging Face hub such as "openai/whisper-tiny.en", whose files are fetched once
        and kept in the hub's cache.
    adapter: folder of a LoRA adapter, of Canter or peft, or a run that trained one; it is merged into the weights. The
        run of an adapter, named as ``model``, finds its model itself.
    device: "cpu", "cuda" or "cuda:1"; "auto" takes a GPU where there is one.
    precision: "float32", "bf16" or, on a CPU, "int8"; "auto" is bf16 on a GPU and float32 elsewhere.
    revision: branch, tag or commit of a hub name; "NAME@REVISION" says the same.

    Raises CheckpointError for what is not a model, or an adapter of another model, or cannot be found, ConfigError for
    a device or precision that is not here.
    """
    from canter.inference.recognizer import Recognizer
    from canter.loading import load_module
    from canter.models.hub import checkpoint_of
    from canter.runtime import choose_device

    chosen = choose_device(device)
    if precision not in ("auto", "float32", "bf16", "int8"):
        raise ConfigError(f"precision is {precision!r}; it must be one of auto, float32, bf16, int8")
    if precision == "auto":
        precision = "bf16" if chosen.type == "cuda" else "float32"
    path = checkpoint_of(os.fspath(model), revision)
    return Recognizer(
        load_module(path, chosen, precision, None if adapter is None else Path(adapter)), os.fspath(model)
    )


def build_index(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Source],
    output: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    prompt_tokens: int | None = None,
    text_column: str = "",
    language_column: str = "",
    audio_column: str = "",
    workers: int = 1,
    progress: bool = True,
) -> LengthIndex:
    """Read manifests once, and return the length index from which plans are made.

    sources: NeMo manifests, Lhotse cuts, Common Voice tables, folders, ... (any source that ``canter index`` reads), or
        one YAML of weighted groups.
    output: file of the index, which `LengthIndex.open` opens again; None: a temporary file, removed at the end of this
        process.
    tokenizer: the tokenizer of a model, a folder with one, or "chars" or "bytes" to count those; not needed where rows
        have ``num_tokens``.
    prompt_tokens: number of prompt tokens, added to the tokens of each text with one for the end; None: the number in
        the tokenizer's prompt for the first row.
    text_column, language_column, audio_column: names of the columns (or keys of JSON), where they are not customary.
    workers: number of processes that read and tokenise.

    Rows that cannot be used are counted in ``index.skipped`` and listed in ``index.problems``. Raises ManifestError for
    a source that cannot be read or has no usable row.
    """
    from canter.corpus.build import index_sources
    from canter.corpus.columns import Columns
    from canter.corpus.counting import UNITS, prompt_length
    from canter.corpus.index import Source
    from canter.corpus.mixture import sources_of

    given: Any = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    columns = Columns(text_column, language_column, audio_column)
    if any(isinstance(one, Source) for one in given):
        listed = [one if isinstance(one, Source) else Source(str(one), columns=columns) for one in given]
    else:
        listed = sources_of([str(one) for one in given], columns)
    counter: Any = tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        from canter.models.hub import checkpoint_of
        from canter.text import load_counter

        name = os.fspath(tokenizer)
        counter = load_counter(name if name in UNITS else checkpoint_of(name))
    if prompt_tokens is None:
        prompt_tokens = prompt_length(counter, _rows(listed))
    target = Path(tempfile.mkdtemp(dir=scratch_folder())) / "lengths.arrow" if output is None else Path(output)
    return index_sources(
        listed, target, counter, prompt_tokens=prompt_tokens, workers=workers, measure_durations=True, progress=progress
    )


def _rows(sources: Group | list[Source]) -> Iterator[Utterance]:
    """Yield the rows of sources; sources that cannot be read are skipped, because building the index reports them."""
    from canter.corpus.manifest import Utterance
    from canter.corpus.mixture import Group, leaves
    from canter.corpus.sources import open_source
    from canter.errors import ManifestError

    for source in leaves(sources) if isinstance(sources, Group) else sources:
        with suppress(ManifestError):
            for row in open_source(source.path, audio=source.audio, measure_durations=True, columns=source.columns):
                if isinstance(row, Utterance):
                    yield source.tagged(row)


_folder: Path | None = None


def scratch_folder() -> Path:
    """Return a folder for temporary files that is removed at the end of the process."""
    global _folder
    if _folder is None or not _folder.exists():
        _folder = Path(tempfile.mkdtemp(prefix="canter-"))
        atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    return _folder


def measure_budget(
    model: Recognizer | str | os.PathLike[str],
    index: LengthIndex,
    *,
    optimizer: Literal["adamw", "muon"] = "adamw",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    limit_gib: float | None = None,
    recompute: bool = False,
    probes: int = 40,
    minutes: float = 3.0,
    progress: bool = True,
) -> Budget:
    """Measure training steps of ``model`` on this device, and return what fits into memory and how long it takes.

    model: a loaded model, or what `load` takes; it is copied, and not changed.
    index: the lengths that plans will be made for.
    optimizer, precision, recompute: those of the planned training ("auto": bf16 on a GPU, float32 on a CPU;
        ``recompute``: activation checkpointing).
    limit_gib: memory that a step may use, weights included (None: 95 % of a GPU's free memory, half of a CPU's).
    probes, minutes: maximum number of steps to measure, and about how long that may take on a CPU.

    ``canter tune`` does the same with more choices. Raises BudgetError if nothing can be measured.
    """
    from canter.cli.progress import TerminalEvents
    from canter.events import QUIET
    from canter.inference.recognizer import Recognizer
    from canter.runtime import choose_device
    from canter.training.config import OptimizerConfig, TrainConfig
    from canter.training.measure import make_prober
    from canter.tuning.fit import fit_budget, within

    if probes < 1:
        raise ConfigError(f"probes is {probes}; it must be at least 1")
    recognizer = model if isinstance(model, Recognizer) else load(model, precision="float32")
    module: AnyModel = cast(Any, recognizer.module)
    device = next(module.parameters()).device
    config = TrainConfig(optimizer=OptimizerConfig(name=optimizer), device=str(choose_device(str(device))))
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "float32"
    events = TerminalEvents() if progress else QUIET
    memory = None if limit_gib is None else limit_gib * 2**30
    recomputed = module.recomputes
    module.recompute_activations(recompute or recomputed)
    try:
        prober = make_prober(config, module, precision, memory=memory, exact=True, events=events)
    finally:
        module.recompute_activations(recomputed)
    return fit_budget(
        prober,
        within(index, module.longest_seconds, module.positions),
        most_probes=probes,
        probe_seconds=2 * 60 * minutes / probes if device.type == "cpu" else None,
    )


def train(config: TrainConfig, *, progress: bool = True) -> Path:
    """Train a model as ``config`` says, or continue the run that its output folder holds, and return that folder.

    `load` takes the folder for the run's best checkpoint. Under ``torchrun`` or ``srun`` all ranks call it together.
    Raises ConfigError for settings that cannot be used, ManifestError for data that cannot be used.
    """
    from canter.training.recipe import run_training

    if not progress:
        return run_training(config).prepared.run.folder
    from canter.cli.progress import TerminalEvents

    return run_training(config, TerminalEvents()).prepared.run.folder


def score(
    references: str | Sequence[str],
    hypotheses: str | Sequence[str],
    languages: str | Sequence[str | None] | None = None,
    *,
    normalize: Normalization = "standard",
) -> Score:
    """Score hypotheses against references: ``score(...).wer``, ``.cer``, and the counts behind them.

    One text each, or (N,) of each; ``languages``, one for all or (N,), choose the normalisation, English without them.
    ``normalize``: "standard", "leaderboard" as the Open ASR leaderboard does (it ignores the vowel signs of Hindi, Thai
    and other scripts), "basic", or "none". Raises ValueError where there are not as many of each.
    """
    from canter.evaluation.wer import score_texts

    left = [references] if isinstance(references, str) else list(references)
    right = [hypotheses] if isinstance(hypotheses, str) else list(hypotheses)
    langs = [languages] * len(left) if isinstance(languages, str) else languages
    return score_texts(left, right, langs, normalize=normalize)
