"""Models on disk: Canter's own format, Hugging Face's and NeMo's."""
