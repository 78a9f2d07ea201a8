"""Commands: train, sample, evaluate, benchmark."""
