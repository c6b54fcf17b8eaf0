"""GPU types: memory, memory bandwidth and peak arithmetic of each.

Peaks are those of dense matrices with float32 accumulation. Sources: NVIDIA's data sheets of V100 (SXM2), T4,
A10, A100 (SXM4), L4, L40S, H100 (SXM5), H200 and B200 (sparse figures halved), NVIDIA's white papers on Ada
and GA102 for the RTX cards, AWS' G5 page for the A10G, AMD's data sheet of MI300X. Memory is what
the driver reports as total, which is less than the name says where error correction takes its share.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from streamswav.errors import ConfigError

MIB = 1 << 20
TERA = 10**12
GIGA = 10**9


@dataclass(frozen=True)
class Gpu:
    """One type.

    Attributes:
        name: as in the table.
        memory: bytes.
        bandwidth: of its memory, bytes a second.
        peaks: floating point operations a second by precision; float32 is TF32 where there is such,
            since that is what convolutions then use; a missing one is emulated.
    """

    name: str
    memory: int
    bandwidth: float
    peaks: dict[str, float]

    @property
    def bfloat16(self) -> bool:
        """Whether it computes in bfloat16."""
        return "bfloat16" in self.peaks

    def peak(self, precision: str) -> float:
        """Operations a second in a precision; that of float32 where it has to be emulated."""
        return self.peaks.get(precision, self.peaks["float32"])


def _gpu(
    name: str, mebibytes: int, gigabytes_a_second: float, single: float, half: float, *, bfloat16: bool = True
) -> Gpu:
    peaks = {"float32": single * TERA, "float16": half * TERA}
    if bfloat16:
        peaks["bfloat16"] = half * TERA
    return Gpu(name, mebibytes * MIB, gigabytes_a_second * GIGA, peaks)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("T4", 15_360, 320, 8.1, 65, bfloat16=False),
        _gpu("V100-16GB", 16_160, 900, 15.7, 125, bfloat16=False),
        _gpu("V100-32GB", 32_510, 900, 15.7, 125, bfloat16=False),
        _gpu("A10", 23_028, 600, 62.5, 125),
        _gpu("A10G", 23_028, 600, 35, 70),
        _gpu("L4", 23_034, 300, 60.5, 121),
        _gpu("L40S", 46_068, 864, 183, 362),
        _gpu("A100-40GB", 40_536, 1555, 156, 312),
        _gpu("A100-80GB", 81_920, 2039, 156, 312),
        _gpu("H100-80GB", 81_559, 3350, 494.7, 989.4),
        _gpu("H200-141GB", 143_771, 4800, 494.7, 989.4),
        _gpu("B200-180GB", 183_359, 7700, 1100, 2250),
        _gpu("RTX-3090", 24_576, 936, 35.6, 71),
        _gpu("RTX-4090", 24_564, 1008, 82.6, 165.2),
        _gpu("RTX-A6000", 49_140, 768, 77.4, 154.8),
        _gpu("MI300X", 196_288, 5300, 653.7, 1307.4),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return the type of that name, however it is spelled; what only one name begins with will do.

    Raises:
        ConfigError: there is no such type, or several.
    """
    known = {_plain(each): gpu for each, gpu in GPUS.items()}
    given = _plain(name)
    if given in known:
        return known[given]
    begun = [gpu for each, gpu in known.items() if given and each.startswith(given)]
    if len(begun) == 1:
        return begun[0]
    if begun:
        raise ConfigError("--gpu", f"say which one: {', '.join(gpu.name for gpu in begun)}", value=name)
    nearest = [known[each].name for each in difflib.get_close_matches(given, known, n=1, cutoff=0.4)]
    reason = f"there is no such GPU type in the table: {', '.join(GPUS)}"
    raise ConfigError("--gpu", reason, value=name, nearest=nearest[0] if nearest else None)


def recognise(name: str, memory: int) -> Gpu | None:
    """Return the type of a device by the name and the bytes that its driver reports; None: none of these."""
    words = {_plain(word) for word in re.split(r"[^A-Za-z0-9]+", name)}
    fitting = [
        gpu
        for gpu in GPUS.values()
        if {_plain(part) for part in gpu.name.split("-") if not part.endswith("GB")} <= words
    ]
    return min(fitting, key=lambda gpu: abs(gpu.memory - memory), default=None)


def _plain(name: str) -> str:
    return "".join(each for each in name.lower().removeprefix("nvidia") if each.isalnum())
