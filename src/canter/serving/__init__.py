"""The HTTP service: one engine that all requests share, an OpenAI-compatible interface, and a page."""
