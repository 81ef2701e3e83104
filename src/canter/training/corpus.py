"""A run's training data before it is batched: its rows, the tokenizer, the length index; found, or made once."""

import warnings
from collections.abc import Callable, Iterator

from canter.corpus.build import build_index
from canter.corpus.counting import prompt_length
from canter.corpus.index import VERIFIED_ROWS, LengthIndex, Source
from canter.corpus.manifest import Utterance
from canter.corpus.mixture import leaves, mixture_of
from canter.corpus.sources import open_source
from canter.errors import ConfigError
from canter.inference.transcribe import checkpoint_of
from canter.models.model import SpeechModel
from canter.text import Characters, load_tokenizer, train_tokenizer
from canter.text.tokenizer import Tokenizer
from canter.training.config import TrainConfig
from canter.training.run import Run


def utterances(config: TrainConfig) -> Iterator[Utterance]:
    """The rows of the training manifests, with the tags of their sources."""
    mixture = mixture_of(config.manifest)
    for source in leaves(mixture) if mixture else (Source(str(path)) for path in config.manifest):
        for row in open_source(source.path, audio=source.audio):
            if isinstance(row, Utterance):
                yield source.tagged(row)


def find_tokenizer(
    config: TrainConfig, run: Run, initial: SpeechModel | None, say: Callable[[str], None]
) -> tuple[Tokenizer, Characters]:
    """The run's tokenizer and alphabet: those of --init or --tokenizer, or made from the transcripts, once."""
    if initial is not None and not isinstance(initial, SpeechModel):
        return initial.tokenizer, Characters("")  # another library's, which its checkpoints bring along
    folder = run.folder / "tokenizer"
    if config.init is not None and initial is not None and not (folder / "characters.json").exists():
        alphabet = Characters("")  # without a CTC head nothing is written in characters
        if initial.ctc is not None:
            alphabet = Characters.load(checkpoint_of(config.init))
        if initial.ctc is not None and alphabet.size != initial.config.ctc_vocabulary:
            raise ConfigError(
                f"--init {config.init}: its CTC head has {initial.config.ctc_vocabulary} outputs, but its alphabet "
                f"{alphabet.size}; set --loss.ctc-weight 0 --loss.ctc-alone 0 to leave the head out"
            )
        folder.mkdir(exist_ok=True)
        initial.tokenizer.save(folder)
        alphabet.save(folder)
    if not (folder / "characters.json").exists():
        texts: list[str] = []
        languages: set[str] = set()
        for row in utterances(config):
            texts.append(row.text)
            languages |= {lang for lang in (row.lang, row.source_lang, row.target_lang) if lang}
        folder.mkdir(exist_ok=True)
        if config.tokenizer is not None:
            load_tokenizer(config.tokenizer).save(folder)
        else:
            with warnings.catch_warnings(record=True) as notices:
                warnings.simplefilter("always")
                trained = train_tokenizer(texts, languages, config.vocabulary, folder)
            for notice in notices:
                say(str(notice.message))
            say(f"tokenizer of {trained.vocab_size} tokens trained on {len(texts)} transcripts")
        Characters.of(texts).save(folder)
    return load_tokenizer(folder), Characters.load(folder)


def find_index(config: TrainConfig, run: Run, tokenizer: Tokenizer) -> LengthIndex:
    """The run's length index, built where it is not there yet."""
    path = run.folder / "lengths.arrow"
    if path.exists():
        index = LengthIndex.open(path)
        if run.writes and len(index) > VERIFIED_ROWS:
            index.verify()
        return index
    sources = mixture_of(config.manifest) or config.manifest
    return build_index(
        sources, path, tokenizer, prompt_tokens=prompt_length(tokenizer, utterances(config)), progress=True
    )
