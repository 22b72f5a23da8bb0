"""What a run says: rows and their schema, cell files, the environment, the run's folder. No torch."""
