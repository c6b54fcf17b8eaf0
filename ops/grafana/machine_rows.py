"""The rows that tell of machines: GPUs, ranks beside one another, hosts and the cluster."""

from __future__ import annotations

from panels import LIMITS, Limit, Panels, Query, graph


def gpu() -> list[Panels]:
    """What torch and dcgm-exporter tell of the GPUs; empty on a CPU."""
    return [*_torch(), *_dcgm()]


def _torch() -> list[Panels]:
    return [
        graph(
            "GPU memory reserved",
            "percentunit",
            "Peak that torch has reserved, to what the GPU has; OutOfMemory begins at the line.",
            Query(
                "max by (pod, local_rank) (streamswav_gpu_memory_reserved_peak_bytes{<run>}"
                " / streamswav_gpu_memory_total_bytes{<run>})",
                "{{pod}} {{local_rank}}",
            ),
            limit=Limit(LIMITS["gpu_memory_ratio"]),
            most=1,
        ),
        graph(
            "Allocations tried again",
            "none",
            "In the last hour: torch had to free cached memory to go on. Many of them cost speed.",
            Query("sum(increase(streamswav_gpu_alloc_retries_total{<run>}[1h]))", "retries"),
        ),
        graph(
            "MFU",
            "percentunit",
            "Floating point operations of the steps to what the GPU could do in their time.",
            Query("max(streamswav_mfu_ratio{<run>})", "mfu"),
            most=1,
        ),
    ]


def _dcgm() -> list[Panels]:
    return [
        graph(
            "Utilisation",
            "percent",
            "Share of time in which the GPU did anything (dcgm-exporter).",
            Query("DCGM_FI_DEV_GPU_UTIL{<pods>}", "{{pod}} {{gpu}}"),
            most=100,
        ),
        graph(
            "Tensor cores",
            "percentunit",
            "Share of cycles in which the tensor cores worked (dcgm-exporter).",
            Query("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{<pods>}", "{{pod}} {{gpu}}"),
            most=1,
        ),
        graph(
            "Memory bandwidth",
            "percentunit",
            "Share of cycles in which the GPU's memory was busy (dcgm-exporter).",
            Query("DCGM_FI_PROF_DRAM_ACTIVE{<pods>}", "{{pod}} {{gpu}}"),
            most=1,
        ),
        graph(
            "Power",
            "watt",
            "Power that a GPU draws (dcgm-exporter).",
            Query("DCGM_FI_DEV_POWER_USAGE{<pods>}", "{{pod}} {{gpu}}"),
        ),
        graph(
            "Temperature",
            "celsius",
            "Of the GPU (dcgm-exporter); most of them slow down a little above 85.",
            Query("DCGM_FI_DEV_GPU_TEMP{<pods>}", "{{pod}} {{gpu}}"),
            limit=Limit(85),
        ),
        graph(
            "Clock",
            "rotmhz",
            "Of the multiprocessors (dcgm-exporter): one that is below the others is throttled.",
            Query("DCGM_FI_DEV_SM_CLOCK{<pods>}", "{{pod}} {{gpu}}"),
        ),
        graph(
            "XID errors",
            "none",
            "Number of the last XID error (dcgm-exporter): anything but 0 is for whoever owns the node.",
            Query("DCGM_FI_DEV_XID_ERRORS{<pods>}", "{{pod}} {{gpu}}"),
            limit=Limit(1),
        ),
    ]


def ranks() -> list[Panels]:
    """How far the ranks are from one another."""
    return [
        graph(
            "Compute a step",
            "s",
            "Seconds of a step in which a rank computes: the fastest, the median, the slowest rank.",
            Query("max by (stat) (streamswav_rank_compute_seconds{<run>})", "{{stat}}"),
        ),
        graph(
            "Slowest over median",
            "none",
            "All ranks wait for the slowest; RankStraggler begins at the line.",
            Query(
                'max(streamswav_rank_compute_seconds{stat="max",<run>})'
                ' / (max(streamswav_rank_compute_seconds{stat="median",<run>}) > 0)',
                "ratio",
            ),
            limit=Limit(LIMITS["rank_imbalance"]),
        ),
        graph(
            "Slowest rank",
            "none",
            "Its number: one that stays the same has a bad node.",
            Query("max(streamswav_rank_slowest{<run>})", "rank"),
        ),
    ]


def cluster() -> list[Panels]:
    """What node-exporter, cAdvisor and kube-state-metrics tell; empty where they are not scraped."""
    return [*_pods(), *_nodes()]


def _pods() -> list[Panels]:
    return [
        graph(
            "/dev/shm",
            "percentunit",
            "Share of shared memory in use, the fullest pod; OutOfMemory begins at the line.",
            Query("max(streamswav_shm_used_bytes{<run>} / (streamswav_shm_size_bytes{<run>} > 0))", "used"),
            limit=Limit(LIMITS["shm_ratio"]),
            most=1,
        ),
        graph(
            "CPU",
            "none",
            "Cores that a pod uses (cAdvisor).",
            Query(
                "sum by (pod)"
                ' (rate(container_cpu_usage_seconds_total{container!="",<pods>}[$__rate_interval]))',
                "{{pod}}",
            ),
        ),
        graph(
            "CPU throttled",
            "percentunit",
            "Share of periods in which a pod was held back at its CPU limit (cAdvisor).",
            Query(
                "sum by (pod) (rate(container_cpu_cfs_throttled_periods_total{<pods>}[$__rate_interval]))"
                " / sum by (pod) (rate(container_cpu_cfs_periods_total{<pods>}[$__rate_interval]))",
                "{{pod}}",
            ),
            limit=Limit(0.25),
            most=1,
        ),
        graph(
            "Memory",
            "bytes",
            "Working set of a pod (cAdvisor), and its limit (kube-state-metrics).",
            Query('sum by (pod) (container_memory_working_set_bytes{container!="",<pods>})', "{{pod}}"),
            Query('max(kube_pod_container_resource_limits{resource="memory",<pods>})', "limit"),
            dashed="limit",
        ),
        graph(
            "Network received",
            "Bps",
            "Bytes a second that a pod receives: shards and other ranks (cAdvisor).",
            Query(
                "sum by (pod) (rate(container_network_receive_bytes_total{<pods>}[$__rate_interval]))",
                "{{pod}}",
            ),
        ),
        graph(
            "Pods",
            "none",
            "Pods of the run by phase (kube-state-metrics).",
            Query("sum by (phase) (kube_pod_status_phase{<pods>})", "{{phase}}"),
            stacked=True,
        ),
    ]


def _nodes() -> list[Panels]:
    return [
        graph(
            "Node load",
            "none",
            "Load over the cores of each node (node-exporter); above 1 processes wait for a core.",
            Query(
                'node_load5 / on (instance) count by (instance) (node_cpu_seconds_total{mode="idle"})',
                "{{instance}}",
            ),
            limit=Limit(1),
        ),
        graph(
            "Node disk",
            "percentunit",
            "Share of the root disk that is free on each node (node-exporter).",
            Query(
                'node_filesystem_avail_bytes{mountpoint="/"} / node_filesystem_size_bytes{mountpoint="/"}',
                "{{instance}}",
            ),
            limit=Limit(0.1, below=True),
            most=1,
        ),
    ]
