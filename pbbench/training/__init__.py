"""The training step and the loop around it: optimizer, averaged weights, checkpoints, progress, samples of a checkpoint."""
