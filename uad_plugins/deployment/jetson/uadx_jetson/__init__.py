"""The part of a bundle that runs on an NVIDIA Jetson. Python 3.8, numpy, Pillow, tensorrt and pycuda; nothing else."""
