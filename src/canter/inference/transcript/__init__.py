"""Make transcripts of hypotheses: long audio, timestamps, languages, writers."""
