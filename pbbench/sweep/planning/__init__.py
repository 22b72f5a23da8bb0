"""What is known before a sweep runs: predicted peaks, what fits a memory, and what a calibrated GPU adds to it."""
