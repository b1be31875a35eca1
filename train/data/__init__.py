"""Data sets: files of rows, mixtures of them, and their way into batches."""
