"""Transcripts: chunks of long audio, segments and words, subtitles and file formats."""
