"""Features, encoders, decoder, the model; checkpoints in and out."""
