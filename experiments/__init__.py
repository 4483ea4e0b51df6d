"""Studies that run the scripts by their command lines and publish what they measured."""
