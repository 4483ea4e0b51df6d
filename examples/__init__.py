"""Short programs to start from. Run them from the root of the repository: `python -m examples.sample --help`."""
