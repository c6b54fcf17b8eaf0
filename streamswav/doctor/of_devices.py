"""Checks of GPUs: driver against torch's build, devices against ranks, memory against the step, NCCL."""

from __future__ import annotations

import socket
import warnings

import torch
from torch import distributed

from streamswav.doctor.case import Case
from streamswav.doctor.finding import Finding, NotLookedAtError, failed, passed, size, skipped, warned
from streamswav.doctor.running import PLANNING_SECONDS, Check

_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def check_gpus(case: Case) -> Finding:
    """Find the GPUs, as the ranks will."""
    wanted, build = case.config.training.device, torch.version.cuda
    if wanted == "cpu":
        raise NotLookedAtError("training.device is cpu")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        return _without(case, wanted, build, "; ".join(str(each.message).splitlines()[0] for each in said))
    count, ranks = torch.cuda.device_count(), case.ranks_here
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    driver = case.machine.driver()
    text = f"{count} x {', '.join(names)}, torch {torch.__version__} for CUDA {build}, driver {driver}"
    if ranks > count:
        remedy = "start fewer ranks (--nproc-per-node), or ask for more GPUs (nvidia.com/gpu)"
        return failed(f"{text}: {ranks} ranks on this machine", remedy)
    if strange := _unsupported(count):
        remedy = "install a torch build that was made for these GPUs"
        return failed(f"{text}: this build has no code for {strange}", remedy)
    return passed(text)


def _without(case: Case, wanted: str, build: str | None, said: str) -> Finding:
    driver = case.machine.driver()
    if driver and build is None:
        return failed(
            f"there is a driver ({driver}), but torch {torch.__version__} is a build for the CPU",
            "install torch from the index for CUDA, as the image does",
        )
    if driver:
        return failed(
            f"there is a driver ({driver}), but torch for CUDA {build} finds no device: {said or '-'}",
            f"ask for GPUs (nvidia.com/gpu), look at CUDA_VISIBLE_DEVICES, or use a driver for CUDA {build}",
        )
    if wanted == "cuda":
        return failed(
            f"no CUDA device is visible here (torch {torch.__version__}, CUDA {build or 'none'}, no driver)",
            "run on a GPU node (nvidia.com/gpu, runtimeClassName), or set training.device to auto or cpu",
        )
    return skipped("no GPU here: training.device auto trains on the CPU")


def _unsupported(count: int) -> str:
    """Name the first device that torch was not built for; code for an older one of its line runs on it."""
    built = {arch.partition("_")[2] for arch in torch.cuda.get_arch_list()}
    majors = {each[:-1] for each in built}
    for index in range(count):
        major, minor = torch.cuda.get_device_capability(index)
        if built and str(major) not in majors:
            return f"sm_{major}{minor}"
    return ""


def check_fit(case: Case) -> Finding:
    """Hold a step's memory, as planning counts it, against the GPU's."""
    gpu = case.gpu
    if gpu is None:
        raise NotLookedAtError("no GPU here, and none is named (--gpu)")
    plan = case.plan
    fit, memory = plan.fit, plan.memory.total
    text = f"a step takes about {size(memory)} of {size(fit.available)} of a {gpu.name} ({fit.share:.0%})"
    if fit.fits:
        return passed(text)
    more = f"{fit.fitting_from} GPUs, " if fit.fitting_from else ""
    return warned(text, f"{more}training.micro_batches, activation_checkpointing or a smaller training.batch")


def check_collectives(case: Case) -> Finding:
    """See that what the ranks talk through is there, and that the interfaces named for it are."""
    if wrong := [_named(case, name) for name in _INTERFACES if _named(case, name)]:
        there = ", ".join(name for _, name in socket.if_nameindex())
        return failed(
            f"{'; '.join(wrong)}; there are {there}", "name one of these, or leave the variable out"
        )
    if case.world_size == 1:
        raise NotLookedAtError("one rank talks to nobody")
    if case.on_gpu and not case.cuda:
        raise NotLookedAtError("NCCL is looked at where the GPUs are")
    if not case.cuda:
        return passed(f"gloo, for {case.world_size} ranks on CPUs")
    if not distributed.is_nccl_available():
        return failed("torch was built without NCCL", "install torch from the index for CUDA")
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return passed(f"NCCL {version} and gloo, for {case.world_size} ranks")


def _named(case: Case, name: str) -> str:
    """Say what is wrong with a list of interfaces: `eth`, `=eth0`, `^lo`, by their beginnings."""
    text = case.environment.get(name, "")
    exact, there = text.startswith("="), [each for _, each in socket.if_nameindex()]
    asked = [each.partition(":")[0] for each in text.removeprefix("=").split(",") if each]
    if not asked or text.startswith("^"):
        return ""
    exact = exact or name == "GLOO_SOCKET_IFNAME"
    if any(each == one if exact else each.startswith(one) for each in there for one in asked):
        return ""
    return f"{name} = {text}: there is no such interface"


CHECKS = (
    Check("gpus", check_gpus, seconds=60),
    Check("fit", check_fit, seconds=PLANNING_SECONDS),
    Check("collectives", check_collectives),
)
