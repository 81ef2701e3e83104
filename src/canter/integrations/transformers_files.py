"""A folder, or a name on the hub, to transformers' model, feature extractor and tokenizer."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoTokenizer
from transformers.utils import logging

from canter.errors import CheckpointError
from canter.models.files import refuse_adapter


def load_parts(name: str | Path, **kwargs: Any) -> tuple[Any, Any, Any]:
    """Model, feature extractor and tokenizer, as ``TransformersModel.from_pretrained`` wants them. Raises
    CheckpointError."""
    if Path(name).is_dir():
        refuse_adapter(Path(name))
        kwargs["local_files_only"] = True
    silent, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, loading = AutoModelForSpeechSeq2Seq.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **kwargs
        )
        extractor = AutoFeatureExtractor.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        told = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{name}: transformers cannot load it: {told}") from None
    finally:
        logging.set_verbosity(level)
        if silent:
            logging.enable_progress_bar()
    faults = {what: sorted(map(str, loading[f"{what}_keys"])) for what in ("missing", "mismatched")}
    told = [f"{len(names)} {what}: {', '.join(names[:8])}" for what, names in faults.items() if names]
    if told:
        raise CheckpointError(f"{name}: tensors do not fit the configuration. {'; '.join(told)}")
    return model.eval(), extractor, tokenizer
