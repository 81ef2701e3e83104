"""Score transcripts and translations: WER, CER, BLEU, chrF and RTFx."""
