"""Canter: train and run attention encoder-decoder speech models without waste."""

__version__ = "0.1.0"
