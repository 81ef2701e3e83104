"""A synthetic speech corpus, to try everything on: two languages, a hundred voices, unlimited sentences."""

from canter.demo.synthesis.corpus import Corpus, synthesise

__all__ = ["Corpus", "synthesise"]
