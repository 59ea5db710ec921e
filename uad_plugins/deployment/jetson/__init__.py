"""What a bundle for NVIDIA Jetson takes along: ``runner.py`` and the folder ``uadx_jetson`` beside it, copied as they are.

They run on the device with Python 3.8 or newer and import nothing of uadx, torch or anomalib.
"""
