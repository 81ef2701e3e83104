"""Models by name: a file or folder on disk, the checkpoint of a run, or a model of the Hugging Face hub.

Only the files that Canter reads are fetched from the hub, into its own cache: settings, tokenizer, and weights in one
format, safetensors first. Nothing in them is executed.
"""

# pyright: strict

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from canter.errors import CheckpointError
from canter.extras import require
from canter.untrusted import is_file_name, read_json_value

HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*?)(@(?P<revision>[\w][\w./-]*))?")
# Small files that say how weights are read: settings, feature extractor, tokenizer.
SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*.json",
    "canter_tokenizer.json",
    "characters.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "vocab*.json",
    "vocab*.txt",
    "merges.txt",
    "*.model",
)
ESPNET = ("meta.yaml", "exp/*/config.yaml", "exp/*.pth", "data/*.model", "data/*/tokens.txt")
WEIGHTS = "model.safetensors"
ADAPTER, OUR_ADAPTER = "adapter_config.json", "canter_adapter.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHT_FILES = (WEIGHTS, "pytorch_model.bin", "model.bin")  # the last one is CTranslate2's
SECONDS = 10.0  # that the hub has to answer before the cache is used


def checkpoint_of(model: str | Path, revision: str | None = None) -> Path:
    """Return the file or folder on disk that holds the model which ``model`` names.

    A path that exists stands for itself, and the folder of a training run for its best checkpoint (without one, for its
    newest). Anything else is taken as a hub name such as ``openai/whisper-tiny.en``, whose files are fetched if the
    cache lacks them; ``revision`` (a branch, tag or commit) may also be written ``NAME@REVISION``.

    Raises CheckpointError for a run without a complete checkpoint, and for a name that is neither on disk nor on the
    hub.
    """
    path = Path(model)
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"{path} is on this disk and has no revision {revision!r}; leave it out")
        if not (path / OUR_ADAPTER).is_file():
            refuse_adapter(path)
        return _of_run(path)
    named = HUB_NAME.fullmatch(os.fspath(model))
    if named is None or path.suffix in (".nemo", ".safetensors"):
        raise CheckpointError(
            f"{path} does not exist; give a run, a model folder, a .nemo file, or a model of the Hugging Face hub "
            f"such as {_like(path.name)}"
        )
    return _of_hub(named["name"], revision or named["revision"])


def is_hub_name(model: str | Path | None) -> bool:
    """Return whether ``model`` has the form ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` and is not a path here."""
    if model is None or Path(model).exists() or Path(model).suffix in (".nemo", ".safetensors"):
        return False
    return HUB_NAME.fullmatch(os.fspath(model)) is not None


def _like(name: str) -> str:
    """Return a hub name to give as an example: Whisper's of this size, if ``name`` is a size."""
    bare = name.removeprefix("whisper-")
    size = re.fullmatch(r"(tiny|base|small|medium)(\.en)?|large(-v[23](-turbo)?)?", bare)
    return f"openai/whisper-{bare}" if size else "openai/whisper-tiny.en"


def adapter_folder(path: str | Path) -> Path:
    """Return the folder of an adapter: ``path`` itself, or the best checkpoint of a run.

    Raises CheckpointError for anything else.
    """
    path = Path(path)
    folder = _of_run(path) if path.is_dir() else path
    if not (folder / ADAPTER).is_file():
        there = f"holds no {ADAPTER}" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"adapter {folder} {there}; name the folder of a LoRA adapter, or a run that trained one (one of the hub: "
            "'hf download NAME --local-dir FOLDER')"
        )
    return folder


def holds_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, and no model beside it."""
    models = ("model*.safetensors", "pytorch_model*.bin")
    return (folder / ADAPTER).is_file() and not any(next(folder.glob(one), None) for one in models)


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for an adapter of peft, which is loaded together with a model that the user names."""
    if not holds_adapter(folder):
        return
    from canter.models.formats.files import read_json  # with torch

    base = None
    with suppress(CheckpointError):
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    raise CheckpointError(
        f"{folder} is a PEFT adapter of {base or 'a model that it does not name'}, not a model: name that model, and "
        "this folder as its adapter (--adapter FOLDER, or canter.load(MODEL, adapter=FOLDER))"
    )


def _of_run(path: Path) -> Path:
    checkpoints = path / "checkpoints"
    if not checkpoints.is_dir():
        return path
    best = checkpoints / "best.json"
    if best.exists():
        try:
            name = read_json_value(best)["checkpoint"]
            if not is_file_name(name):
                raise ValueError(f"its checkpoint is {name!r:.80}")
            chosen = checkpoints / name
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{best} is damaged ({error}); name a folder of {checkpoints} instead") from None
        if chosen.is_dir():
            return chosen
    whole = sorted({file.parent for kind in ("config.json", ADAPTER) for file in checkpoints.glob(f"step-*/{kind}")})
    if not whole:
        raise CheckpointError(f"{path} holds no checkpoint yet; train on, or name a model folder")
    return whole[-1]


def _of_hub(name: str, revision: str | None) -> Path:
    """Return the folder in the cache, or the ``.nemo`` file in it, with the hub's model ``name``."""
    require("huggingface_hub", f"{name} does not exist here, and a model of the Hugging Face hub")
    from huggingface_hub import constants, errors

    if not constants.HF_HUB_OFFLINE:
        try:
            return _fetched(name, revision)
        except errors.RevisionNotFoundError:
            raise CheckpointError(f"{name} has no revision {revision!r} on the Hugging Face hub") from None
        except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
            gated = isinstance(error, errors.GatedRepoError)
            why = (
                f"its owner asks you to accept terms at https://huggingface.co/{name}"
                if gated
                else "no file or folder here, and no public model of the Hugging Face hub"
            )
            raise CheckpointError(f"{name}: {why}; for a private or gated model log in with 'hf auth login'") from None
        except CheckpointError:
            raise
        except Exception as error:  # the client's errors differ by version; what the cache holds will do
            return _cached(name, revision, f"huggingface.co cannot be reached ({_short(error)})")
    return _cached(name, revision, "HF_HUB_OFFLINE is set")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text[:80]}"


def _fetched(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # pyright: ignore[reportUnknownVariableType]

    from canter.models.formats.files import read_json

    info = HfApi().model_info(name, revision=revision, timeout=SECONDS)
    files = [file.rfilename for file in info.siblings or []]
    commit = info.sha or revision

    def read_index(file: str) -> object:
        return read_json(Path(hf_hub_download(name, file, revision=commit)))

    wanted = _wanted(name, files, read_index)
    # under the name of the revision, so that the cache knows later which commit that was
    folder = snapshot_download(name, revision=revision, allow_patterns=wanted)
    return _model_in(Path(folder), wanted)


def _cached(name: str, revision: str | None, why: str) -> Path:
    from huggingface_hub import constants, errors, snapshot_download  # pyright: ignore[reportUnknownVariableType]

    from canter.models.formats.files import read_json

    at = f"@{revision}" if revision else ""
    told = f" --revision {revision}" if revision else ""
    short = name.rpartition("/")[2]
    way_out = (
        f"where there is a network, run 'hf download {name}{told} --local-dir {short}', copy that folder here and "
        "name it"
    )
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        raise CheckpointError(
            f"{name}{at} is no file or folder here, is not in the cache of the Hugging Face hub "
            f"({constants.HF_HUB_CACHE}), and {why}; {way_out}"
        ) from None
    wanted: list[str] = []
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.exists()]
    try:
        wanted = _wanted(name, files, lambda file: read_json(folder / file))
        missing = [file for file in wanted if not (folder / file).exists()]
    except CheckpointError:
        missing = [WEIGHTS]
    if missing:
        raise CheckpointError(
            f"{name}{at}: the cache of the Hugging Face hub holds a part of it alone, without {missing[0]} ({folder}), "
            f"and {why}; {way_out}"
        )
    return _model_in(folder, wanted)


def _wanted(name: str, files: Sequence[str], read_index: Callable[[str], object]) -> list[str]:
    """Return the files of a hub model to fetch, out of all that it has.

    Raises CheckpointError for a model without weights that are read.
    """
    settings = [file for file in files if any(fnmatch.fnmatchcase(file, pattern) for pattern in SETTINGS)]
    settings = [file for file in settings if "/" not in file]
    for weights in WEIGHT_FILES if "config.json" in files else ():
        index = f"{weights}.index.json"
        if weights in files:
            return [*settings, weights]
        if index in files:
            from canter.models.formats.files import shard_names

            return [*settings, index, *shard_names(read_index(index), f"{name}: {index}")]
    if "meta.yaml" in files:
        return [file for file in files if any(fnmatch.fnmatchcase(file, pattern) for pattern in ESPNET)]
    if ADAPTER in files:
        raise CheckpointError(
            f"{name} is a PEFT adapter, not a model: fetch it with 'hf download {name} --local-dir FOLDER', and name "
            "the model that it changes with --adapter FOLDER, or canter.load(MODEL, adapter=FOLDER)"
        )
    archives = [file for file in files if file.endswith(".nemo")]
    if len(archives) == 1:
        return archives
    if archives:
        raise CheckpointError(
            f"{name} holds {len(archives)} .nemo files ({', '.join(sorted(archives)[:4])}); fetch the one you want "
            f"with 'hf download {name} FILE' and name it"
        )
    raise CheckpointError(
        f"{name} holds neither {', '.join(WEIGHT_FILES)} with a config.json, nor a .nemo file, nor ESPnet's "
        "meta.yaml: nothing that Canter reads"
    )


def _model_in(folder: Path, wanted: Sequence[str]) -> Path:
    return folder / wanted[0] if len(wanted) == 1 and wanted[0].endswith(".nemo") else folder
