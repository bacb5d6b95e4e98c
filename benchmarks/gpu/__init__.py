"""The first hour on a GPU as one command: is every number right there, what does it cost, and does the GPU wait for the
host?

python -m benchmarks.gpu                        # every part, within 60 minutes; without CUDA the toy size on the CPU
python -m benchmarks.gpu --part right           # a group or some parts by name, see --list
python -m benchmarks.gpu --part step --minutes 8 --output step.json
python -m benchmarks.gpu --report               # docs/results/gpu.md from docs/results/gpu.json
"""
