"""`python -m benchmarks` measures every stage on this machine; `python -m benchmarks.gpu_check` checks a GPU."""
