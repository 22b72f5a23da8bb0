"""The figures of a run: charts, timelines, samples side by side, and how all of them look."""
