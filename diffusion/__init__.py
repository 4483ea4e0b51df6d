"""The mathematics of sampling: interpolant, time, samplers. Networks are passed in as functions."""
