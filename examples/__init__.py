"""Short programs to begin one's own with; run from the root of the repository: `python -m examples.sample --help`."""
