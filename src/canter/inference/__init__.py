"""Transcription: loading, recordings and queues, the decoding engine, and transcripts."""
