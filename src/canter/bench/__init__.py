"""`canter bench`: measure decoding speed and latency beside other frameworks."""
