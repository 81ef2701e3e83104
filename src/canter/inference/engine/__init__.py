"""The decoding engine: audio in, hypotheses out."""
