"""What every stage costs, on the machine at hand: `python -m benchmarks`; and whether a GPU does what it should:
`python -m benchmarks.gpu_check`.
"""
