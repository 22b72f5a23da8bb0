"""Numbers out of a run's cells, and those numbers laid out for people in a terminal, Markdown or LaTeX."""
