"""Manifests of every kind to utterances; audio decoding; the length index."""
