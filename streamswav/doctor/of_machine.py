"""Checks of the machine or container: shared memory, open files, processes, memory, cores, scratch space."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from pathlib import Path

from streamswav.defaults import known
from streamswav.doctor.case import Case
from streamswav.doctor.finding import Finding, NotLookedAtError, failed, passed, size, warned
from streamswav.doctor.machine import Limit
from streamswav.doctor.running import PLANNING_SECONDS, Check
from streamswav.errors import StreamswavError
from streamswav.planning.host import Host, count_host
from streamswav.planning.ledger import PARTS
from streamswav.planning.traffic import SAMPLE_BYTES

SCRATCH_BYTES = 1 << 20

_FILLED = 0.8

_LEVERS = {
    "launcher and ranks": "the number of ranks",
    "loader processes": "loader.workers",
    "blocks and windows": "stream.memory, stream.window or loader.workers",
    "batches": "training.batch, loader.prefetch or loader.workers",
    "model": "training.batch",
    "checkpoint": "the size of the model (model.trunk)",
}
"""What makes a part of the memory smaller."""


def check_shm(case: Case) -> Finding:
    """Hold the size of /dev/shm against the batches on their way to the ranks."""
    need, shm = _needs(case).shared_memory, case.machine.shm
    if not need:
        raise NotLookedAtError("no loader processes: nothing is handed over (loader.workers 0)")
    if not shm.is_dir():
        return failed(f"{shm} is not there", "mount a tmpfs there (a Memory emptyDir in a pod)")
    there = shutil.disk_usage(shm).total
    text = f"{shm} has {size(there)}, batches on their way take {size(need)}"
    remedy = (
        f"give it {size(2 * need)} (a Memory emptyDir with a sizeLimit, or --shm-size), or lower "
        "loader.workers or loader.prefetch"
    )
    if there < need:
        return failed(text, remedy)
    return warned(text, remedy) if need > _FILLED * there else passed(text)


def check_files(case: Case) -> Finding:
    """Hold the limit of open files against what one process opens."""
    need = _needs(case).files
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return passed("open files are not limited")
    text = f"a process may open {soft} files, {need} are needed"
    enough = hard == resource.RLIM_INFINITY or hard >= 2 * need
    how = f"ulimit -n {2 * need}{'' if enough else f', and raise the hard limit, which is {hard}'}"
    remedy = f"{how} (in a pod: of the container runtime), or lower loader.workers"
    if soft < need:
        return failed(text, remedy)
    return warned(text, remedy) if soft < 1.5 * need else passed(text)


def check_tasks(case: Case) -> Finding:
    """Hold the limits of processes and threads against those that are started."""
    need, limit = _needs(case).tasks, case.machine.tasks()
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() and soft != resource.RLIM_INFINITY and (limit is None or soft < limit.amount):
        limit = Limit(soft, "ulimit -u, of all processes of this user")
    if limit is None:
        return passed(f"processes and threads are not limited; about {need} are started")
    text = f"{limit.amount:.0f} processes and threads are allowed ({limit.source}), about {need} are started"
    remedy = f"raise the limit (podPidsLimit, pids.max) to {2 * need}, or lower loader.workers"
    if limit.amount < need:
        return failed(text, remedy)
    return warned(text, remedy) if limit.amount < 1.25 * need else passed(text)


def check_memory(case: Case) -> Finding:
    """Hold the memory limit against what ranks and loader processes take."""
    need, limit = _needs(case, whole=True), case.machine.memory()
    if limit is None:
        raise NotLookedAtError("the limit is not known here")
    sure = sum(need.memory.values())
    parts = ", ".join(f"{part} {size(amount)}" for part, amount in need.memory.items())
    text = f"{size(limit.amount)} ({limit.source}); needed are {size(sure)}: {parts}"
    enough = size(1.2 * (sure + need.budget))
    more = f"raise the limit to {enough}" if limit.is_set else f"use a machine with {enough} free"
    if limit.amount < sure:
        largest = max(need.memory, key=need.memory.__getitem__)
        return failed(text, f"{more}, or lower {_LEVERS[largest]}{_elsewhere(case, largest)}")
    if limit.amount < sure + need.budget:
        grown = f"{text}; stream.memory lets windows grow by {size(need.budget)} more"
        return warned(grown, f"{more}, or lower stream.memory or loader.workers")
    return passed(text)


def _elsewhere(case: Case, largest: str) -> str:
    """What else helps where the model counts that a GPU would hold."""
    gpu = largest == "model" and case.config.training.device == "auto"
    return "; is the run meant for GPUs? --gpu TYPE counts it there" if gpu else ""


def check_cores(case: Case) -> Finding:
    """Hold the CPU cores, or the quota, against the loader processes and ranks."""
    workers, ranks, cores = known(case.resolved.loader.workers), case.ranks_here, case.machine.cores()
    busy = ranks * max(1, workers)
    text = f"{cores.amount:g} cores ({cores.source}) for {ranks} x {workers} loader processes"
    if cores.amount < ranks:
        return warned(text, f"give {busy} cores, or start fewer ranks")
    if cores.amount < busy:
        fitting = int(cores.amount // ranks)
        return warned(
            text, f"give {busy} cores, or set loader.workers to a divisor of stream.rows up to {fitting}"
        )
    return passed(text)


def check_scratch(case: Case) -> Finding:
    """Write a file where temporary files go; the rest of the file system may be read-only."""
    try:
        folder = case.machine.scratch or Path(tempfile.gettempdir())
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(SCRATCH_BYTES))
            file.flush()
    except OSError as error:
        return failed(
            f"no temporary file can be written ({error.strerror})",
            "mount a writable folder at /tmp (an emptyDir in a pod), or name one by TMPDIR",
        )
    root = " (the root is read-only)" if os.statvfs("/").f_flag & os.ST_RDONLY else ""
    return passed(f"{folder} is writable, {size(shutil.disk_usage(folder).free)} free{root}")


def _needs(case: Case, *, whole: bool = False) -> Host:
    """Count what the ranks of this machine need; the `whole` has the model and its checkpoints too."""
    config, cuda = case.resolved, case.on_gpu
    model, checkpoint = _of_model(case) if whole else (0, 0)
    manifest, specimens = case.listing.known(), case.specimens.known()
    sample = specimens.mean_bytes if specimens and specimens.samples else SAMPLE_BYTES
    if manifest is not None and manifest.samples:
        sample = manifest.size / manifest.samples
    return count_host(
        config,
        world_size=case.world_size,
        ranks=case.ranks_here,
        cores=len(os.sched_getaffinity(0)),
        cuda=cuda,
        sample_bytes=sample,
        model=model,
        checkpoint=checkpoint,
    )


def _of_model(case: Case) -> tuple[int, int]:
    """Bytes of a step on the CPU and of a checkpoint; 0 for a command whose model planning does not know."""
    try:
        plan = case.plan
    except (NotLookedAtError, StreamswavError):
        return 0, 0
    tensors = sum(amount for part, amount in plan.memory.parts.items() if part in PARTS)
    return 0 if case.on_gpu else tensors, plan.checkpoints.bytes


CHECKS = (
    Check("shm", check_shm, seconds=60),
    Check("files", check_files),
    Check("tasks", check_tasks),
    Check("memory", check_memory, seconds=PLANNING_SECONDS),
    Check("cores", check_cores),
    Check("scratch", check_scratch),
)
