"""Tokenizers and prompt formats."""
