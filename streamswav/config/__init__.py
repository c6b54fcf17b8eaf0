"""The configuration, read from YAML, environment and command line.

    sections <- combinations <- reading

Later sources win: file, then `STREAMSWAV_SECTION__KEY`, then `--section.key value`.
"""

from streamswav.config.combinations import check_combinations, check_endpoint
from streamswav.config.reading import dump_config, load_config, parse_config
from streamswav.config.sections import (
    CheckpointSection,
    Config,
    CropsSection,
    EvaluationSection,
    FinetuneSection,
    HealthSection,
    LabelsSection,
    LoaderSection,
    LowshotSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    Section,
    StorageSection,
    StreamSection,
    SwavSection,
    TelemetrySection,
    TrainingSection,
    WatchdogSection,
    keys,
)

__all__ = [
    "CheckpointSection",
    "Config",
    "CropsSection",
    "EvaluationSection",
    "FinetuneSection",
    "HealthSection",
    "LabelsSection",
    "LoaderSection",
    "LowshotSection",
    "ModelSection",
    "OptimizerSection",
    "RunSection",
    "Section",
    "StorageSection",
    "StreamSection",
    "SwavSection",
    "TelemetrySection",
    "TrainingSection",
    "WatchdogSection",
    "check_combinations",
    "check_endpoint",
    "dump_config",
    "keys",
    "load_config",
    "parse_config",
]
