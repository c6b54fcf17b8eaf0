"""`streamswav doctor`: looks at everything that a run will need, before it runs.

    case -> checks (of_*.py) -> findings -> report

A check is a function of a `Case` that returns a `Finding`. It knows neither arguments nor output, and leaves
nothing behind. The runner bounds its time and makes a finding of whatever it raises.
"""

from streamswav.doctor.case import Case
from streamswav.doctor.catalogue import CHECKS
from streamswav.doctor.finding import Finding
from streamswav.doctor.machine import Machine
from streamswav.doctor.running import Check, Result, exit_code, run_checks

__all__ = ["CHECKS", "Case", "Check", "Finding", "Machine", "Result", "exit_code", "run_checks"]
