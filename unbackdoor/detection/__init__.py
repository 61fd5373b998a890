"""Object detection on a backbone: train a Faster R-CNN, score it clean and triggered.

Only ``scores`` of a finished detector know of attacks; what trains one cannot reach them.
"""
