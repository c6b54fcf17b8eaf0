"""Multi-crop: boxes, decoding, resizing on the CPU, and batched augmentation on the device.

    bytes -> MultiCrop -> Crops -> collate -> Augment -> what the network sees

`decode` stays in `streamswav.crops.decode`, whose name it shares.
"""

from streamswav.crops.augment import Augment, normalise
from streamswav.crops.boxes import draw_boxes
from streamswav.crops.decode import image_size, sniff
from streamswav.crops.multicrop import Crops, MultiCrop, centre_crop, collate
from streamswav.crops.parameters import ORDERS, Column, ParameterLaw
from streamswav.philox import uniforms

__all__ = [
    "ORDERS",
    "Augment",
    "Column",
    "Crops",
    "MultiCrop",
    "ParameterLaw",
    "centre_crop",
    "collate",
    "draw_boxes",
    "image_size",
    "normalise",
    "sniff",
    "uniforms",
]
