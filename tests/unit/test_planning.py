"""What a plan counts, held against torch's own accounting on real tensors and against known figures."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from streamswav.config import parse_config
from streamswav.defaults import Facts, resolve
from streamswav.errors import ConfigError
from streamswav.models import build_network
from streamswav.planning import (
    GPUS,
    Request,
    find_gpu,
    images_bound,
    largest_batch,
    make_plan,
    recognise,
)
from streamswav.planning.ledger import (
    ACTIVATIONS,
    BACKWARD,
    FORWARD,
    GRADIENTS,
    STATE,
    WEIGHTS,
    Ledger,
    watch,
)
from streamswav.planning.memory import last_that_fits
from streamswav.planning.rehearsal import rehearse
from streamswav.planning.speed import estimate_speed
from streamswav.planning.traffic import count_network, count_reading, sinkhorn_bytes
from streamswav.swav import sinkhorn
from streamswav.training.build import AUTOCAST, assemble
from streamswav.training.checkpoint import pack
from streamswav.training.optim import build_optimizer

LOCAL = 4
SMALL = {
    "crops": {"sizes": [64, 32], "counts": [2, 3], "scales": [[0.3, 1.0], [0.1, 0.3]]},
    "model": {"trunk": "resnet8", "width": 0.5, "head_hidden": 64, "embedding": 16},
    "swav": {"prototypes": 50, "queue_length": 0},
    "training": {"batch": LOCAL, "precision": "float32"},
}
FACTS = Facts(
    world_size=1,
    cores=4,
    cuda=True,
    bfloat16=True,
    shards=100_000,
    samples=1_000_000,
    trunk_parameters=1,
)


def small(world_size=1, **sections):
    merged = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}}
    return resolve(parse_config(merged), dataclasses.replace(FACTS, world_size=world_size))[0]


def size(tensors):
    return sum(each.numel() * each.element_size() for each in tensors)


def real_parts(config):
    torch.manual_seed(0)
    network = build_network(config.model, prototypes=config.swav.prototypes)
    optimizer = build_optimizer(config.optimizer, network.parameters())
    crops = [
        torch.randn(count * LOCAL, 3, edge, edge).to(memory_format=torch.channels_last)
        for count, edge in zip(config.crops.counts, config.crops.sizes, strict=True)
    ]
    return network, optimizer, crops


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("trunk", ["resnet8", "resnet50", "resnext50_32x4d"])
def test_what_is_saved_for_backward_is_what_torch_saves_on_real_tensors(precision, trunk):
    config = small(training={"precision": precision}, model={"trunk": trunk})
    network, _, crops = real_parts(config)
    standing = {each.data_ptr() for each in (*network.parameters(), *network.buffers(), *crops)}
    saved = {}

    def pack_tensor(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in standing:
            saved[storage.data_ptr()] = storage  # kept, so that no address comes twice
        return tensor

    autocast = torch.autocast("cpu", dtype=AUTOCAST[precision], enabled=precision != "float32")
    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor), autocast:
        network(crops)
    measured = sum(each.nbytes() for each in saved.values())
    planned = rehearse(config, world_size=1)
    # Without memory, mean and deviation of a batch norm come out in autocast's type, half as wide.
    in_trunk, in_head = (4 * sum(channels) for channels in planned.normalised)
    missing = 0 if precision == "float32" else len(crops) * in_trunk + in_head
    assert planned.ledger.most[ACTIVATIONS] == measured - missing
    assert measured > 1e5


def test_autocast_halves_what_is_saved():
    single, half = (
        rehearse(small(training={"precision": each, "batch": 64}), world_size=1)
        for each in ("float32", "bfloat16")
    )
    assert 0.45 < half.ledger.most[ACTIVATIONS] / single.ledger.most[ACTIVATIONS] < 0.6


@pytest.mark.parametrize(("optimizer", "copies"), [("lars", 1), ("sgd", 1), ("adamw", 2)])
def test_weights_gradients_and_optimizer_state_are_those_of_a_real_step(optimizer, copies):
    config = small(optimizer={"name": optimizer})
    network, real, crops = real_parts(config)
    learner = assemble(config, network, real, None)
    learner.step(crops, rate=0.1, freeze_prototypes=False, use_queue=False)
    planned = rehearse(config, world_size=1)
    held = planned.standing
    assert held[WEIGHTS] == size([*network.parameters(), *network.buffers()])
    assert held[GRADIENTS] == size(each.grad for each in network.parameters())
    state = [each for of in real.state.values() for each in of.values() if torch.is_tensor(each)]
    assert held[STATE] == planned.optimizer == size(state)
    assert size(state) == pytest.approx(copies * size(network.parameters()), rel=0.01)


@pytest.mark.parametrize(
    ("precision", "within"),
    [("float32", 0.03), ("bfloat16", 0.1)],  # the CPU's own convolutions in bfloat16 take some room
)
def test_the_peak_is_that_of_a_real_step_by_the_allocators_own_account(precision, within):
    config = small(training={"precision": precision, "batch": 16}, model={"trunk": "resnet10"})
    network, optimizer, _ = real_parts(config)
    learner = assemble(config, network, optimizer, None)
    crops = [torch.randn(n * 16, 3, edge, edge) for n, edge in ((2, 64), (3, 32))]
    learner.step(crops, rate=0.1, freeze_prototypes=False, use_queue=False)
    learner.optimizer.zero_grad()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        learner.step(crops, rate=0.1, freeze_prototypes=False, use_queue=False)
    events = profiler.profiler.kineto_results.events()
    changes = [(each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    planned = rehearse(config, world_size=1)
    before = planned.standing[WEIGHTS] + planned.optimizer + planned.crops
    assert planned.ledger.peak_bytes - before == pytest.approx(most, rel=within)


def test_buckets_hold_the_gradients_through_the_whole_step():
    alone, shared = (
        rehearse(small(), world_size=1),
        rehearse(small(world_size=2), world_size=2, local=LOCAL),
    )
    assert shared.ledger.peak[GRADIENTS] >= 4 * shared.parameters
    assert (
        alone.ledger.peak_bytes <= shared.ledger.peak_bytes <= alone.ledger.peak_bytes + 4 * alone.parameters
    )


def test_a_ledger_on_real_tensors_says_the_same_as_on_tensors_without_memory():
    config = small()
    network, optimizer, crops = real_parts(config)
    learner, ledger = assemble(config, network, optimizer, None), Ledger()
    ledger.hold([*network.parameters(), *network.buffers()], WEIGHTS)
    with watch(ledger, network, optimizer):
        learner.step(crops, rate=0.1, freeze_prototypes=False, use_queue=False)
    planned = rehearse(config, world_size=1).ledger
    for phase in (FORWARD, BACKWARD):
        assert ledger.flops(phase) == planned.flops(phase) > 0


@pytest.mark.parametrize("saving", [{"micro_batches": 4}, {"activation_checkpointing": True}])
def test_what_is_computed_again_takes_less_memory_and_one_more_forward_pass(saving):
    training, trunk = {"batch": 32}, {"trunk": "resnet18"}
    whole = rehearse(small(training=training, model=trunk), world_size=1)
    saved = rehearse(small(training={**training, **saving}, model=trunk), world_size=1)
    assert saved.ledger.peak[ACTIVATIONS] < 0.6 * whole.ledger.peak[ACTIVATIONS]
    assert saved.ledger.peak_bytes < 0.8 * whole.ledger.peak_bytes
    assert saved.ledger.flops(FORWARD) == whole.ledger.flops(FORWARD)
    more = saved.ledger.flops(BACKWARD) - whole.ledger.flops(BACKWARD)
    assert 0.8 * whole.ledger.flops(FORWARD) < more <= whole.ledger.flops(FORWARD)


def test_flops_are_those_of_torchs_counter_on_real_tensors():
    config = small(model={"trunk": "resnet18"})
    network, _, crops = real_parts(config)
    with FlopCounterMode(display=False) as counter:
        scores = network(crops)[1]
    forward = counter.get_total_flops()
    with counter:
        scores.sum().backward()
    planned = rehearse(config, world_size=1).ledger
    assert planned.flops(FORWARD) == forward
    assert planned.flops(BACKWARD) == counter.get_total_flops() > forward


def test_backward_of_grouped_convolutions_costs_twice_forward_but_for_the_first_layer():
    planned = rehearse(small(model={"trunk": "resnext50_32x4d"}), world_size=1).ledger
    assert 1.9 < planned.flops(BACKWARD) / planned.flops(FORWARD) < 2


def resnet50(sizes, counts):
    scales = [[0.1, 1.0]] * len(sizes)
    crops = {"sizes": sizes, "counts": counts, "scales": scales}
    config = resolve(parse_config({"crops": crops, "training": {"batch": 2}}), FACTS)[0]
    return rehearse(config, world_size=1).ledger.flops(FORWARD) / 2


def test_resnet50_and_the_papers_crops_cost_what_is_known():
    twice, crops = resnet50([224], [2]), resnet50([224, 96], [2, 6])
    assert twice / 2 / 2 == pytest.approx(4.09e9, rel=0.003)  # multiply-adds of one 224 image
    assert crops / (twice / 2) == pytest.approx(3.10, abs=0.01)


def test_what_sinkhorn_sends_is_what_it_sends(monkeypatch):
    config, sent = small(), []
    monkeypatch.setattr(dist, "all_reduce", lambda values, *_, **__: sent.append(size([values])))
    crops = len(config.swav.assigned_crops)
    group = object()
    sinkhorn(
        torch.randn(crops, LOCAL, config.swav.prototypes), iterations=config.swav.iterations, group=group
    )
    assert sum(sent) == sinkhorn_bytes(config)


def test_gradients_go_around_the_ring_and_nothing_is_sent_by_one_gpu():
    alone, four = small(), small(world_size=4)
    lonely = count_network(
        rehearse(alone, world_size=1), alone, world_size=1, sample_bytes=10, step_seconds=1
    )
    assert dataclasses.astuple(lonely) == (10 * LOCAL, 0, 0, 0, 10 * LOCAL)
    rehearsed = rehearse(four, world_size=4, local=LOCAL)
    network = count_network(rehearsed, four, world_size=4, sample_bytes=10, step_seconds=2)
    assert network.gradients == 2 * 3 * 4 * rehearsed.parameters // 4
    assert network.batch_norm > 0


def test_requests_are_blocks_of_every_shard_and_one_for_each_lane():
    config = small(
        storage={"block_bytes": 100}, stream={"columns": 2, "rows": 3, "passes": 2}, loader={"workers": 1}
    )
    listed = count_reading(config, samples=None, sample_bytes=1, sizes=[(250, 2), (100, 2)])
    assert (listed.bytes, listed.requests) == (700, 2 * 3 + 2 * 1 + 2 * 6)
    guessed = count_reading(config, samples=70, sample_bytes=10)
    assert (guessed.bytes, guessed.requests) == (700, 7 + 12)
    assert count_reading(config, samples=None, sample_bytes=10) is None


def test_a_checkpoint_weighs_what_is_written():
    config = small(swav={"queue_length": 2 * LOCAL, "prototypes": 50})
    network, optimizer, crops = real_parts(config)
    learner = assemble(config, network, optimizer, None)
    learner.step(crops, rate=0.1, freeze_prototypes=False, use_queue=False)
    plan = make_plan(Request(config=config, gpus=1, gpu=GPUS["T4"]))
    written = len(pack(learner.state_dict()))
    assert plan.checkpoints.bytes == pytest.approx(written, rel=0.02)


def test_the_batch_that_fits_is_a_power_of_two_within_80_percent():
    paper = parse_config({"crops": {"sizes": [224], "counts": [2], "scales": [[0.14, 1.0]]}})
    facts = dataclasses.replace(FACTS, world_size=64, bfloat16=False)
    assert largest_batch(paper, facts, memory=GPUS["V100-16GB"].memory) == 64
    open_queue = parse_config(
        {**{k: v for k, v in SMALL.items() if k != "training"}, "swav": {"queue_length": 64}}
    )
    assert largest_batch(open_queue, facts, memory=80 << 30) == 256
    assert largest_batch(open_queue, facts, memory=1 << 30) == 1


@pytest.mark.parametrize(
    ("shares", "expected"), [([0.1, 0.5, 0.8, 0.9], 2), ([0.9, 1.0], -1), ([0.1], 0), ([], -1)]
)
def test_the_last_that_fits(shares, expected):
    assert last_that_fits(list(range(len(shares))), shares.__getitem__, 0.8) == expected


def test_the_fewest_gpus_that_fit_are_those_on_which_it_then_fits():
    config = parse_config(
        {**SMALL, "training": {"batch": 4096, "precision": "float32"}, "stream": {"columns": 64}}
    )
    tiny = dataclasses.replace(GPUS["T4"], memory=3 << 30)
    needed = make_plan(Request(config=config, gpus=4, gpu=tiny)).fit
    assert not needed.fits
    at, below = (
        make_plan(Request(config=config, gpus=gpus, gpu=tiny)).fit
        for gpus in (needed.fitting_from, needed.fitting_from // 2)
    )
    assert (at.fits, below.fits) == (True, False)


def test_gpu_types_are_found_however_they_are_spelled():
    assert find_gpu("a100-80gb") is find_gpu("NVIDIA A100 80GB") is GPUS["A100-80GB"]
    assert find_gpu("H100").name == "H100-80GB"
    with pytest.raises(ConfigError, match="say which one: A100-40GB, A100-80GB"):
        find_gpu("A100")
    with pytest.raises(ConfigError, match=r"no such GPU type.*did you mean MI300X\?"):
        find_gpu("MI-30X")
    with pytest.raises(ConfigError):
        find_gpu("")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_every_type_is_plausible(gpu):
    named = [int(part) for part in gpu.name.removesuffix("GB").split("-") if part.isdigit()]
    assert not named or gpu.name.startswith("RTX") or 0.9 < gpu.memory / (named[-1] << 30) <= 1
    assert gpu.peak("float32") < gpu.peak("float16")
    assert gpu.bfloat16 == (gpu.name[0] not in "TV")
    assert math.isfinite(gpu.bandwidth)


def test_too_little_for_batch_statistics_is_a_mistake_that_is_named():
    config = parse_config(
        {"crops": {"sizes": [32, 16], "counts": [1, 1], "scales": [[0.1, 1.0]] * 2}, "training": {"batch": 1}}
    )
    with pytest.raises(ConfigError, match=r"training\.batch: too few images at once"):
        make_plan(Request(config=config, gpus=1, gpu=GPUS["T4"]))


def test_a_gpu_is_recognised_by_its_drivers_name():
    names = {
        ("NVIDIA A100-SXM4-80GB", 81_920): "A100-80GB",
        ("NVIDIA A100-PCIE-40GB", 40_536): "A100-40GB",
        ("Tesla V100-SXM2-16GB", 16_160): "V100-16GB",
        ("NVIDIA H100 80GB HBM3", 81_559): "H100-80GB",
        ("NVIDIA GeForce RTX 4090", 24_564): "RTX-4090",
        ("NVIDIA A10G", 22_731): "A10G",
        ("NVIDIA A10", 23_028): "A10",
        ("Tesla T4", 15_360): "T4",
    }
    for (device, mebibytes), name in names.items():
        found = recognise(device, mebibytes << 20)
        assert found is not None
        assert found.name == name
    assert recognise("Quadro P2000", 1 << 32) is None


def test_the_bound_of_the_mfu_is_the_one_that_the_plan_divides_by():
    config = small(world_size=2)
    bound = images_bound(config, GPUS["A100-40GB"], world_size=2)
    rehearsal = rehearse(config, world_size=2)
    local = config.training.batch // 2
    speed = estimate_speed(
        rehearsal.ledger, GPUS["A100-40GB"], precision=config.training.precision, local=local, efficiency=0.5
    )
    assert 2 * speed.images_per_second / bound == pytest.approx(speed.mfu)
