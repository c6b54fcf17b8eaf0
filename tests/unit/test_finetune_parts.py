"""The parts of finetuning: mixing, crops, rates of the layers, what is chosen and why, the frozen trunk."""

from __future__ import annotations

import pytest
import torch
from finetune_runs import coloured
from tiny_run import tiny_config

from streamswav.config import Config, CropsSection, FinetuneSection, load_config
from streamswav.crops import MultiCrop
from streamswav.crops.rand_augment import RandAugmentCrop
from streamswav.defaults import FINETUNE_BASE, Facts
from streamswav.models import build_trunk
from streamswav.training.distributed import Ranks
from streamswav.training.optim import build_optimizer
from streamswav.training.pace import Stride
from streamswav.transfer.finetuning.defaults import complete, rules_of_trunk, rules_that_hold
from streamswav.transfer.finetuning.finetune import build_finetuning
from streamswav.transfer.finetuning.mixing import Mixing
from streamswav.transfer.finetuning.network import FinetuneNetwork, head_settings, parameter_groups
from streamswav.transfer.finetuning.task import Finetuning
from streamswav.transfer.measuring.heads import HeadBank

FACTS = Facts(world_size=2, cores=4, cuda=False, bfloat16=False, shards=4, samples=100, trunk_parameters=1)
TINY = [
    "--model.trunk",
    "resnet10",
    "--model.width",
    "0.125",
    "--model.stem",
    "small",
    "--crops.sizes",
    "[16]",
]


def config(*words: str) -> Config:
    return load_config(None, {}, [*TINY, "--labels.classes", "3", *words], base=FINETUNE_BASE)


def complete_config(*words: str) -> Config:
    given = config("--training.precision", "float32", *words)
    return complete(given, None, rules_that_hold(given, FACTS))[0]


# Mixing.


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % 3
    return torch.rand(size, 3, 8, 8, generator=generator), torch.nn.functional.one_hot(labels, 3).float()


@pytest.mark.parametrize("kind", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 0.8}])
def test_images_and_targets_are_mixed_by_the_same_share(kind: dict[str, float]) -> None:
    images, targets = batch()
    dark = torch.zeros_like(images)
    for image, label in zip(dark, targets.argmax(dim=1), strict=True):
        image[label] = 1  # a channel is a class: the mean of the channels is the target
    mixed, shares = Mixing(**kind, seed=1)(dark, targets, seen=64)
    torch.testing.assert_close(mixed.mean(dim=(2, 3)), shares)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(6))
    assert not torch.equal(shares, targets)


def test_what_is_mixed_depends_on_seed_images_and_rank_alone() -> None:
    images, targets = batch()
    torch.manual_seed(1)
    first = Mixing(mixup=0.4, cutmix=0.4, seed=1)(images, targets, seen=64)[0]
    torch.manual_seed(2)
    assert torch.equal(first, Mixing(mixup=0.4, cutmix=0.4, seed=1)(images, targets, seen=64)[0])
    for seed, rank, seen in ((2, 0, 64), (1, 1, 64), (1, 0, 128)):
        other = Mixing(mixup=0.4, cutmix=0.4, seed=seed, rank=rank)(images, targets, seen=seen)[0]
        assert not torch.equal(first, other)


def test_both_kinds_come_by_turns() -> None:
    images, targets = batch()
    mixing = Mixing(mixup=1.0, cutmix=1.0, seed=3)
    kept = [
        bool((mixing(images, targets, seen=step)[0] == images).flatten(1).any(1).all()) for step in range(20)
    ]
    assert 4 <= sum(kept) <= 16  # cutmix leaves the pixels outside its box as they are


# Crops.


def test_rand_augment_is_a_function_of_the_sample_and_leaves_the_crop_and_torch_alone() -> None:
    section = CropsSection(sizes=[16], counts=[1], scales=[(0.3, 1.0)])
    plain = MultiCrop(section, seed=7)
    made = RandAugmentCrop(section, FinetuneSection(rand_augment=2), seed=7)
    image, changed = coloured(1), 0
    for ordinal in range(8):
        key = (0, 1234, ordinal)
        state = torch.get_rng_state()
        crops = made(image, key=key)
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(ordinal)
        assert torch.equal(crops.pixels[0], made(image, key=key).pixels[0])
        assert crops.pixels[0].shape == plain(image, key=key).pixels[0].shape
        assert torch.equal(crops.parameters, plain(image, key=key).parameters)
        changed += not torch.equal(crops.pixels[0], plain(image, key=key).pixels[0])
    assert changed >= 5


# Rates.


def network(*words: str) -> tuple[FinetuneNetwork, Config]:
    made = complete_config(*words)
    trunk = build_trunk(made.model)
    head = HeadBank(trunk.feature_dim, 3, head_settings(made), seed=0)
    return FinetuneNetwork(trunk, head, frozen=made.finetune.mode == "frozen"), made


def rate_of(name: str, net: FinetuneNetwork, made: Config) -> tuple[float, float]:
    """Rate scale and weight decay of a parameter."""
    wanted = dict(net.named_parameters())[name]
    for group in build_optimizer(made.optimizer, parameter_groups(net, made)).param_groups:
        if any(each is wanted for each in group["params"]):
            return round(group["rate_scale"], 9), group["weight_decay"]
    raise AssertionError(name)


def test_trunk_and_head_have_their_own_rate_and_weight_decay() -> None:
    words = ("--optimizer.rate", "0.01", "--finetune.rates", "[0.2]", "--optimizer.weight_decay", "0.001")
    net, made = network(*words, "--finetune.weight_decays", "[0]")
    assert rate_of("trunk.conv1.weight", net, made) == (1, 0.001)
    assert rate_of("trunk.layer4.0.conv1.weight", net, made) == (1, 0.001)
    assert rate_of("head.heads.0.weight", net, made) == (20, 0)


def test_with_layer_decay_each_block_is_slower_than_the_one_above() -> None:
    net, made = network("--finetune.layer_decay", "0.5", "--optimizer.rate", "1", "--finetune.rates", "[1]")
    names = ["head.heads.0.bias", *(f"trunk.layer{stage}.0.bn1.bias" for stage in (4, 3, 2, 1))]
    assert [rate_of(name, net, made)[0] for name in names] == [1, 1, 0.5, 0.25, 0.125]
    assert rate_of("trunk.conv1.weight", net, made)[0] == rate_of("trunk.bn1.weight", net, made)[0] == 0.0625
    groups = parameter_groups(net, made)
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))


def test_the_heads_on_a_frozen_trunk_are_each_rate_with_each_weight_decay() -> None:
    words = ("--finetune.rates", "[0.3, 0.1]", "--finetune.weight_decays", "[0, 0.001]")
    net, made = network("--finetune.mode", "frozen", *words)
    groups = parameter_groups(net, made)
    assert made.optimizer.rate == 0.3
    assert [(round(each["rate_scale"], 9), each["weight_decay"]) for each in groups] == [
        (1, 0),
        (1, 0.001),
        (round(1 / 3, 9), 0),
        (round(1 / 3, 9), 0.001),
    ]


# Steps.


def task(*words: str, multi: bool = False) -> Finetuning:
    return build_finetuning(complete_config("--training.batch", "6", *words), None, Ranks(), multi=multi)


def test_a_frozen_trunk_stays_as_it_is_and_its_heads_learn_as_if_each_were_alone() -> None:
    images, targets = batch()
    rates = ["--finetune.mode", "frozen", "--finetune.rates"]
    both, alone = task(*rates, "[0.3, 3.0]"), task(*rates, "[3.0]")
    alone.learner.module.trunk.load_state_dict(both.learner.module.trunk.state_dict())
    before = {name: tensor.clone() for name, tensor in both.learner.module.trunk.state_dict().items()}
    for each in (both, alone):
        for step in range(3):
            scale = 10 if each is alone else 1  # the first head's rate is the schedule's
            each.step(
                [images, targets.argmax(dim=1)], Stride(rate=0.3 * scale, images=6 * step, done=6 * step)
            )
    after = both.learner.module.trunk.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    heads = both.learner.module.head.heads
    torch.testing.assert_close(heads[1].weight, alone.learner.module.head.heads[0].weight)
    assert not torch.allclose(heads[0].weight, heads[1].weight)


@pytest.mark.parametrize("words", [("--finetune.mixup", "0.4"), ("--finetune.label_smoothing", "0.1"), ()])
def test_a_step_that_is_not_finite_changes_nothing(words: tuple[str, ...]) -> None:
    images, targets = batch()
    made = task(*words)
    state = made.learner.state_dict()["network"]
    before = {name: tensor.clone() for name, tensor in state.items()}
    result = made.step([images * float("nan"), targets.argmax(dim=1)], Stride(0.1, 0, 0))
    assert bool(result.skipped)
    counters = [name for name in before if "num_batches" not in name]
    assert all(torch.equal(before[name], state[name]) for name in counters)
    assert not bool(made.step([images, targets.argmax(dim=1)], Stride(0.1, 6, 6)).skipped)


def test_several_labels_an_image_are_each_a_yes_or_no() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 16, 16, generator=generator)
    wanted = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 1]]).float()
    made = task(multi=True)
    losses = [float(made.step([images, wanted], Stride(0.1, 6 * step, 6 * step)).loss) for step in range(60)]
    assert losses[0] == pytest.approx(3 * 0.6931, rel=0.1)
    assert losses[-1] < 0.5 * losses[0]
    assert made.readings() == {}


# What is chosen.


def test_everything_that_was_left_open_is_chosen_with_a_reason() -> None:
    made, choices = complete(config(), None, rules_that_hold(config(), FACTS))
    assert made.training.batch == 24  # a quarter of 100, over two ranks
    assert made.optimizer.rate == pytest.approx(0.1 * 24 / 256)
    assert made.finetune.rates == [made.optimizer.rate]
    assert made.loader.workers == 0
    assert made.optimizer.weight_decay == 1e-4
    assert all(len(choice.reason) > 4 for choice in choices)


@pytest.mark.parametrize(
    ("words", "rate", "rates", "decay"),
    [
        (["--model.init", "run"], 0.01, [0.2], 1e-4),
        (["--model.init", "run", "--optimizer.rate", "0.02"], 0.02, [0.4], 1e-4),
        (["--finetune.mode", "frozen"], 0.3, [0.3, 0.1, 0.03, 1.0], 1e-6),
        (["--finetune.mode", "frozen", "--finetune.rates", "[0.5]"], 0.5, [0.5], 1e-6),
        (["--optimizer.weight_decay", "0"], 0.1, [0.1], 0),
    ],
)
def test_rates_follow_what_is_trained(
    words: list[str], rate: float, rates: list[float], decay: float
) -> None:
    made = complete_config("--training.batch", "256", *words)
    assert made.optimizer.rate == pytest.approx(rate)
    assert made.finetune.rates == pytest.approx(rates)
    assert made.finetune.weight_decays == [made.optimizer.weight_decay] == [decay]


def test_a_large_set_is_left_to_the_general_rules_of_workers() -> None:
    facts = Facts(**{**vars(FACTS), "samples": 100_000})
    assert "loader.workers" not in rules_that_hold(config(), facts)
    assert complete(config(), None, rules_that_hold(config(), facts))[0].training.batch == 256


def test_a_trunk_brings_its_shape_and_its_normalisation_unless_they_are_given() -> None:
    source = tiny_config()
    plain = load_config(None, {}, ["--crops.mean", "[0.1, 0.1, 0.1]"], base=FINETUNE_BASE)
    made, choices = complete(plain, None, rules_of_trunk(source))
    assert (made.model.trunk, made.model.width, made.model.stem) == ("resnet10", 0.125, "small")
    assert made.crops.sizes == [16]
    assert made.crops.mean == (0.1, 0.1, 0.1)
    assert made.crops.std == source.crops.std
    assert "crops.mean" not in {choice.key for choice in choices}


def test_a_run_that_goes_on_keeps_what_it_chose() -> None:
    begun = complete_config("--optimizer.rate", "0.7")
    again, choices = complete(config(), begun, rules_that_hold(config(), FACTS))
    assert again.optimizer.rate == 0.7
    assert {choice.reason for choice in choices} == {"as the run began"}
