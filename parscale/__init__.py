"""The research system: data, training, checkpoints, decoding, evaluation."""
