"""Bytes on disk: atomic files, shards, photographs, sets of images."""
