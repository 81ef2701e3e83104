"""Canter: train and run attention encoder-decoder speech models without waste."""

__version__ = "0.2.0"


def __getattr__(name: str):
    # torch takes a second to import: only those who load a model wait for it
    if name == "load_model":
        from canter.extras import needed_by

        with needed_by("canter.load_model"):
            from canter.models.checkpoint import load_model

        return load_model
    raise AttributeError(f"module 'canter' has no attribute {name!r}")
