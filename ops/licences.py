"""Writes ops/licences.md: under what licence each package of the image is, and of what kind that is.

    python ops/licences.py            # after a change of ops/locks

Packages and versions are those of ops/locks, licences what each of them declares where it is installed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "ops" / "licences.md"
LOCKS = sorted(set((ROOT / "ops" / "locks").glob("*.txt")) - {ROOT / "ops" / "locks" / "tools.txt"})

PERMISSIVE = {
    "0BSD",
    "3-Clause BSD License",
    "Apache Software License",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD",
    "BSD License",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "MIT",
    "MIT License",
    "MIT-CMU",
    "PSF-2.0",
    "Python Software Foundation License",
    "Zlib",
}
WEAK_COPYLEFT = {"MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)"}
NVIDIA = {"LicenseRef-NVIDIA-Proprietary", "NVIDIA Proprietary Software", "Other/Proprietary License"}
NOTHING_INSIDE = {"cuda-toolkit"}
"""Distributions that only name others, and declare nothing."""

HEAD = """# Licences of what is in the image

Written by `python ops/licences.py` from `ops/locks` (all extras) and what each package declares. A test holds
it in step, and fails at a licence that nobody has looked at: none here forbids an image of this Apache-2.0
project, on NVIDIA's conditions. The texts are in the image, in each package's `*.dist-info`, Debian's in
`/usr/share/doc/*/copyright`. This is engineering, not legal advice.

- **Permissive** (MIT, BSD, Apache and their like): the texts stay with the files.
- **Weak copyleft**: tqdm, in part, and certifi, which the extra `wandb` brings (MPL-2.0). Their files stay
  under it; the image has them as they were published.
- **NVIDIA's**: proprietary. Its agreements let the libraries be given on as parts of an application, not
  alone and not changed. The image changes none of them; it leaves out headers and static libraries. Whoever
  publishes an image outside their own company reads the agreements first (`nvidia_*.dist-info/licenses/`).
- **Inside wheels**: numpy and scipy bring OpenBLAS (BSD), libgfortran (GPL with the GCC runtime exception)
  and libquadmath (LGPL, a shared library); torch and scikit-learn libgomp (GPL with that exception);
  torchvision two libraries of NVIDIA's; Pillow, torchvision, simplejpeg and pyarrow codecs under permissive
  licences.

"""


def locked() -> dict[str, str]:
    """Name (as PyPI normalises it) to version, of all locks of the image."""
    text = "".join(path.read_text() for path in LOCKS)
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def declared(names: list[str]) -> list[dict[str, str]]:
    """Name, version and licence of each, as installed beside this Python."""
    command = [
        str(Path(sys.executable).with_name("pip-licenses")),
        "--format=json",
        "--from=mixed",
        "--with-system",
    ]
    done = subprocess.run([*command, "--packages", *names], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return sorted(({**each, "Name": normal(each["Name"])} for each in found), key=lambda each: each["Name"])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def kind(package: dict[str, str]) -> str:
    """The group of a package; where it offers a choice, the best.

    Raises:
        ValueError: a licence that nobody has looked at.
    """
    if package["Name"] in NOTHING_INSIDE:
        return "nothing inside"
    parts = set(re.split(r" AND |; ", package["License"]))
    parts = {part for part in parts if not PERMISSIVE & set(part.split(" OR "))}
    if not parts:
        return "permissive"
    if parts <= WEAK_COPYLEFT:
        return "weak copyleft"
    if parts <= NVIDIA and package["Name"].startswith("nvidia-"):
        return "NVIDIA's"
    reason = "look it up; ops/licences.py says what is known"
    raise ValueError(f"{package['Name']} {package['Version']} is under {package['License']}: {reason}")


def page() -> str:
    """The page.

    Raises:
        ValueError: a package is not installed in its locked version, or its licence is not known.
    """
    wanted = locked()
    packages = declared(list(wanted))
    here = {each["Name"]: each["Version"] for each in packages}
    if here != wanted:
        differing = sorted(name for name in wanted if here.get(name) != wanted[name])
        raise ValueError(f"not installed here as locked: {', '.join(differing)}; bash ops/setup")
    rows = [f"| {each['Name']} | {each['Version']} | {each['License']} | {kind(each)} |" for each in packages]
    return HEAD + "| package | version | declares | kind |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
