"""WER, CER, RTFx."""
