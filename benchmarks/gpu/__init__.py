"""The first hour on a GPU as one command: are the numbers right, what do they cost, and does the GPU wait for the host?

python -m benchmarks.gpu                        # all parts, within 60 minutes; without CUDA the toy size on the CPU
python -m benchmarks.gpu --part right           # a group, or parts by name; see --list
python -m benchmarks.gpu --part step --minutes 8 --output step.json
python -m benchmarks.gpu --report               # docs/results/gpu.md from docs/results/gpu.json
"""

from benchmarks.gpu.missing import stand_in

MISSING = stand_in()
