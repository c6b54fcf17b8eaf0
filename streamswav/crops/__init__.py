"""Multi-crop: boxes, decoding, resizing on the CPU, and batched augmentation on the device."""
