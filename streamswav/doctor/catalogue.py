"""All checks, in the order in which one builds upon another."""

from __future__ import annotations

from streamswav.doctor import (
    of_configuration,
    of_data,
    of_devices,
    of_machine,
    of_network,
    of_run,
    of_speed,
    of_storage,
)
from streamswav.doctor.running import Check

CHECKS: tuple[Check, ...] = (
    *of_configuration.CHECKS,
    *of_storage.CHECKS,
    *of_data.CHECKS,
    *of_run.CHECKS,
    of_configuration.SETTINGS,
    of_run.ROOM,
    *of_machine.CHECKS,
    *of_devices.CHECKS,
    *of_network.CHECKS,
    *of_speed.CHECKS,
)
