"""The families that are exported, against the list that dashboards, alerts and the design are written by."""

import re

import pytest

from streamswav.telemetry.families import FAMILIES

LISTED = """
gauge run_info{attempt,version,git_sha,world_size,config_hash}
gauge run_state{state=init|training|waiting|evaluating|checkpoint|draining|done|failed}
gauge step
counter images_total
gauge run_images_remaining
gauge last_step_timestamp_seconds
gauge process_start_timestamp_seconds
counter worker_exits_total{reason=ok|drained|cuda_oom|host_oom|shm|nccl_timeout|nonfinite|data|config|signal}
histogram step_duration_seconds
counter step_phase_seconds_total{phase=data_wait|h2d|forward_backward|sinkhorn|allreduce|optimizer|other}
gauge mfu_ratio
gauge rank_compute_seconds{stat=min|median|max}
gauge rank_slowest
gauge loss
gauge prototypes
gauge learning_rate
gauge gradient_norm{part=all|trunk|head|prototypes}
gauge prototype_usage_ratio
gauge assignment_entropy_ratio
gauge assignment_information_ratio
gauge embedding_std_ratio
gauge rankme
gauge embedding_rankme
gauge prototypes_unique_ratio
gauge crop_agreement_ratio
gauge queue_fill_ratio
gauge queue_staleness_ratio
gauge verdict{verdict=healthy|stuck|dimensional_collapse|prototype_collapse|queue_rebound|diverging}
counter nonfinite_steps_total
gauge nonfinite_steps_consecutive
gauge probe_accuracy_ratio{probe}
gauge checkpoint_last_success_timestamp_seconds
gauge checkpoint_last_success_step
gauge checkpoint_interval_seconds
gauge checkpoint_bytes
histogram checkpoint_duration_seconds{phase=stage|upload}
counter checkpoints_total{outcome=ok|failed}
counter shard_opens_total{outcome=ok|missing|changed|error}
counter samples_total{outcome=trained|excluded|filtered|quarantined|skipped_step}
counter quarantined_bytes_total{reason}
counter s3_requests_total{outcome=ok|throttled|error|timeout}
histogram s3_request_duration_seconds
counter s3_received_bytes_total
gauge prefetch_queue_items
gauge prefetch_queue_capacity_items
gauge stream_samples_remaining
gauge stream_shards{state}
gauge lane_lag_samples{stat}
gauge dataloader_workers{state}
counter stage_seconds_total{stage=fetch|parse|decode|crop|collate}
gauge gpu_memory_reserved_peak_bytes{local_rank}
gauge gpu_memory_total_bytes{local_rank}
counter gpu_alloc_retries_total
gauge shm_used_bytes
gauge shm_size_bytes
counter telemetry_seconds_total
"""


@pytest.mark.parametrize("line", LISTED.split("\n")[1:-1])
def test_a_listed_family_is_declared_with_type_and_labels(line):
    kind, name, labels = re.fullmatch(r"(\w+) (\w+)(?:\{(.*)\})?", line).groups()
    family = FAMILIES[name]
    assert family.kind == kind
    wanted = dict(each.partition("=")[::2] for each in (labels or "").split(",") if each)
    assert list(family.labels) == list(wanted)
    for label, values in wanted.items():
        assert {*filter(None, values.split("|"))} <= {*family.labels[label]}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_names_and_labels_follow_prometheus(family):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
    assert (family.kind == "counter") == family.name.endswith("_total")
    assert not {*family.labels} & {"rank", "shard", "key", "run"}, (
        "they grow with the run, or come from the pod"
    )
    assert family.text.strip()
    assert bool(family.buckets) == (family.kind == "histogram")
