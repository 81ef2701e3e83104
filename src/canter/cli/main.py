"""Run the ``canter`` command: find the subcommand, import only that one, and print user errors as one line.

Each module in COMMANDS defines a frozen dataclass ``Options``, whose fields and docstrings are the command's flags and
help, and ``run(options) -> int | None``. A module may define its own ``parse(arguments) -> options``.
"""

import contextlib
import importlib
import os
import select
import sys
from collections.abc import Iterator
from typing import TextIO

from canter import __version__
from canter.errors import CanterError
from canter.extras import needed_by
from canter.redaction import redacted

# name -> (module, one line of help), ordered from the most used to the main path of training
COMMANDS = {
    "transcribe": ("canter.cli.transcribe", "transcribe audio and video to text, subtitles or manifests"),
    "align": ("canter.cli.align", "align a given text with its audio: times and probabilities of words"),
    "serve": ("canter.cli.serve", "serve one or several models over OpenAI's transcription API, with a page"),
    "train": ("canter.cli.train", "train or fine-tune a model, or resume a run"),
    "score": ("canter.cli.score", "compute WER, CER and BLEU of transcripts"),
    "report": ("canter.cli.report", "write a run as one HTML page"),
    "index": ("canter.cli.index", "build a length index from manifests of any format"),
    "inspect": ("canter.cli.inspect", "show the lengths of a manifest or an index, or rows whose text does not fit"),
    "compare": ("canter.cli.compare", "compare batching strategies on your lengths"),
    "plan": ("canter.cli.plan", "plan the batches of an epoch"),
    "tune": ("canter.cli.tune", "measure the memory and time of a training step, and write a budget"),
    "tokenizer": ("canter.cli.tokenizer", "train a tokenizer on transcripts"),
    "bench": ("canter.cli.bench", "measure decoding speed, and compare it with other frameworks"),
    "info": ("canter.cli.info", "print a model's shape, parameters and FLOPs"),
    "convert": ("canter.cli.convert", "convert a model between Canter, Hugging Face, NeMo and ESPnet"),
    "reshape": ("canter.cli.reshape", "move layers from decoder to encoder"),
    "extend": ("canter.cli.extend", "extend a trained model by a language or pieces"),
    "demo": ("canter.cli.demo", "train and evaluate a model on synthesised speech in ten minutes"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"canter {__version__}: transcribe with, train and serve encoder-decoder speech models",
            "",
            "usage: canter COMMAND [OPTIONS]        canter COMMAND --help",
            "",
            *lines,
            "",
            "--no-urls, or CANTER_NO_URLS=1, refuses every URL, for manifests that you do not trust.",
            "CANTER_DEBUG=1 shows the traceback behind an error message.",
        ]
    )


def fail(message: str, code: int = 1) -> int:
    print(f"canter: {message}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0 success, 1 failure, 2 misuse, 130 interrupted.

    The status is 0 if the reader of a pipe closes it early (``canter inspect lengths.arrow | head``).
    """
    try:
        try:
            return dispatch(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout:
                sys.stdout.flush()  # here, because an error at the interpreter's exit cannot be caught
    except BrokenPipeError as error:
        gone = [stream for stream in (sys.stdout, sys.stderr) if has_no_reader(stream)]
        if not gone:
            if os.environ.get("CANTER_DEBUG"):
                raise
            return fail(message_of(error))
        for stream in gone:
            # the interpreter flushes the buffer at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 0


def has_no_reader(stream: TextIO) -> bool:
    """Return whether the stream is a pipe whose reader has closed it, even if nothing is buffered."""
    try:
        stream.flush()
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, ValueError, AttributeError):  # no file behind it, closed, or no poll on this system
        return False


def dispatch(argv: list[str]) -> int:
    """Run one command; report an error that a user can cause as one line, with status 1."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"canter {__version__}")
        return 0
    if "--no-urls" in argv:
        with _without_urls():
            return dispatch([one for one in argv if one != "--no-urls"])
    name, *rest = argv
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "see 'canter --help'"
        return fail(f"'{name}' is not a command; {hint}", 2)
    try:
        with needed_by(f"canter {name}"):
            module = importlib.import_module(COMMANDS[name][0])
            if hasattr(module, "parse"):
                options = module.parse(rest)
            else:
                from canter.cli.options import parse

                options = parse(module.Options, rest, f"canter {name}", module.__doc__)
            return module.run(options) or 0
    except KeyboardInterrupt:
        return fail("interrupted; what was finished is kept", 130)
    except BrokenPipeError:
        raise  # main decides whether the reader of our output closed it
    except (CanterError, ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("CANTER_DEBUG"):
            raise
        return fail(message_of(error))


@contextlib.contextmanager
def _without_urls() -> Iterator[None]:
    """Context manager that refuses URLs, also in processes that are started inside."""
    from canter.corpus.remote import NO_URLS, forbid_urls

    before = os.environ.get(NO_URLS)
    forbid_urls()
    try:
        yield
    finally:
        os.environ.pop(NO_URLS)
        if before is not None:
            os.environ[NO_URLS] = before


def message_of(error: Exception) -> str:
    """Return the error's message; for the system's errors, the file and the reason without their number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return redacted(f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}")
    return redacted(str(error)) or type(error).__name__
