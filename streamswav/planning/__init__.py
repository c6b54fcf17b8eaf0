"""What a run will take, worked out from its configuration before anyone pays for a GPU."""

from streamswav.planning.estimate import Plan, Request, images_bound, make_plan, trunk_parameters
from streamswav.planning.gpus import GPUS, Gpu, find_gpu, recognise
from streamswav.planning.memory import largest_batch

__all__ = [
    "GPUS",
    "Gpu",
    "Plan",
    "Request",
    "find_gpu",
    "images_bound",
    "largest_batch",
    "make_plan",
    "recognise",
    "trunk_parameters",
]
