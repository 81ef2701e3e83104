"""Thin adapters to other frameworks, each optional."""
