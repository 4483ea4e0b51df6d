"""Networks read from and written to files and the hub."""
