"""Print the messages of `canter transcribe`, and choose the files of its output folder."""

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from canter.errors import ConfigError, ManifestError
from canter.redaction import redacted

if TYPE_CHECKING:
    from canter.inference.inputs import Item
    from canter.inference.transcript.subtitles import SubtitleStyle
    from canter.inference.transcript.writers import FolderOutput


def without_words(checkpoint: Path, style: "SubtitleStyle", kinds: list[str], quiet: bool) -> Literal["segment"]:
    """Return the times that subtitles are made of where the model cannot tell when a word was said. Raises ConfigError
    where that will not do."""
    if style.needs_words:
        raise ConfigError(
            f"{checkpoint} cannot tell when a word was said, which these subtitles need; for lines of a given width "
            "without it add --cues sentence, and leave out --highlight-words"
        )
    if not quiet:
        print(
            f"canter: {checkpoint} cannot tell when a word was said: cues that divide a segment share its time in "
            "proportion to their characters",
            file=sys.stderr,
        )
    return "segment"


def tell_what_is_not_taken(inputs: Sequence[str]) -> None:
    """Print how many files of each folder are not transcribed, and the first."""
    from canter.corpus.media import media_in
    from canter.corpus.sources import units_of
    from canter.inference.transcript.formats import SUFFIXES

    ours = {*SUFFIXES.values(), ".partial"}
    for path in inputs:
        if not os.path.isdir(path):
            continue
        with contextlib.suppress(ManifestError):  # reading the inputs will say so
            if [unit.kind for unit in units_of(path)] != ["folder"]:
                continue
        others = [file for file in media_in(os.path.abspath(path))[1] if os.path.splitext(file)[1].lower() not in ours]
        if others:
            number = f"{len(others):,} files are" if len(others) > 1 else "1 file is"
            print(
                f"canter: {path}: {number} not taken, no audio or video (the first: {others[0]})",
                file=sys.stderr,
            )


def into_folder(
    output: Path,
    items: "list[Item]",
    roots: Sequence[str],
    kinds: list[str],
    style: "SubtitleStyle",
    skip_existing: bool,
    quiet: bool,
) -> "tuple[list[Item], FolderOutput]":
    """Return the items to transcribe, and the files of each in the output folder."""
    from canter.inference.transcript.writers import FolderOutput, file_names

    names = file_names(items, roots)
    each = [kind for kind in kinds if kind != "nemo"]
    files = FolderOutput(output, names, each, style)
    if not skip_existing:
        return items, files
    done = [all(path.exists() for _, path in files.files(index)) for index in range(len(items))]
    if any(done) and not quiet:
        listed = [shown_path(one.row) for one, is_done in zip(items, done) if is_done]
        print(f"canter: {len(listed):,} left out, whose files exist: {some_of(listed)}", file=sys.stderr)
    wanted = [index for index, is_done in enumerate(done) if not is_done]
    return [items[index] for index in wanted], replace(files, names=[names[index] for index in wanted])


def shown_path(row: Mapping[str, Any]) -> str | None:
    """Return the audio's path in a row of a manifest, of a URL without its secrets."""
    path = row.get("audio_filepath")
    return redacted(path) if isinstance(path, str) else None


def some_of(paths: "Sequence[Any]", most: int = 5) -> str:
    """Return the names of the first files, and how many there are beside."""
    names = [*dict.fromkeys(Path(str(path)).name for path in paths)]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def warn_of_other_languages(items: "Sequence[Item]", asked: str) -> None:
    """Print how many rows name another language than --language, which holds for rows that name none."""
    from canter.text.languages import is_said, same

    own = [u.source_lang or u.lang for item in items if (u := item.utterance)]
    others = sorted({language for language in own if is_said(language) and not same(language, asked)})
    if others:
        count = sum(language in others for language in own)
        print(
            f"canter: --language {asked} is for rows that name none; {count:,} name their own ({', '.join(others)})",
            file=sys.stderr,
        )


def say(summary: dict[str, Any]) -> None:
    """The summary in a few lines on stderr."""
    failed = summary["failed"]
    for entry in failed[:20]:
        print(f"canter: {entry['error']}", file=sys.stderr)
    if len(failed) > 20:
        print(f"canter: ... and {len(failed) - 20} more", file=sys.stderr)
    damaged = summary["warnings"]
    for entry in damaged[:20]:
        print(f"canter: {entry['audio_filepath']}: {entry['warning']}", file=sys.stderr)
    if len(damaged) > 20:
        print(f"canter: ... and {len(damaged) - 20} more warnings", file=sys.stderr)
    resumed = f", {summary['resumed']} of them from an earlier start" if summary["resumed"] else ""
    unread = f"; {len(failed)} failed" if failed else ""
    ranks = f" on {summary['ranks']} ranks" if summary["ranks"] > 1 else ""
    counters = summary["counters"]
    print(
        f"{summary['transcribed']} of {summary['utterances']} transcribed{resumed}{unread}; "
        f"{summary['audio_seconds']:,.0f} s of audio in {summary['seconds']:.1f} s{ranks}, "
        f"RTFx {summary['rtfx']:,.1f} (features {counters['feature_seconds']:.1f} s, "
        f"encoder {counters['encoder_seconds']:.1f} s, "
        f"decoder {counters['decoder_seconds']:.1f} s at {summary['mean_rows']:.0f} rows)",
        file=sys.stderr,
    )
    for path in summary["output"]:
        print(f"written: {path}", file=sys.stderr)
