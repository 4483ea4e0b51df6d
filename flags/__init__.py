"""Command-line flags: types, groups and --config."""
