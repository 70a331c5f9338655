"""Learning rates at the corners of every schedule, and who decays."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from neobert import NeoBERTConfig
from neobert.heads import NeoBERTForMaskedLM
from neobert.pretraining.optimizer import Optimizer, build, parameter_groups, set_lr
from neobert.pretraining.schedule import Schedule
from neobert.readers import InputError


def test_the_papers_schedule_at_its_corners() -> None:
    paper = Schedule()
    assert paper.lr_at(0) == 6e-4 / 2000
    assert paper.lr_at(999) == pytest.approx(3e-4)
    assert paper.lr_at(1999) == paper.lr_at(2000) == 6e-4
    assert paper.lr_at((2000 + 900_000) // 2) == pytest.approx(6e-4 * 0.55)
    assert paper.lr_at(899_999) > paper.lr_at(900_000)
    for step in (900_000, 999_999, 1_000_000):
        assert paper.lr_at(step) == 6e-4 * 0.1


def test_a_linear_decay_is_a_straight_line() -> None:
    linear = Schedule("linear", lr=1.0, warmup=10, steps=110, decay_to=0.2, decay_at=1.0)
    found = [linear.lr_at(step) for step in range(10, 111)]
    assert found == pytest.approx([1 - 0.8 * i / 100 for i in range(101)])


def test_a_constant_rate_stays_after_its_warm_up() -> None:
    constant = Schedule("constant", lr=0.5, warmup=4, steps=3)
    assert [constant.lr_at(s) for s in range(6)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


@given(
    st.sampled_from(["paper", "linear"]),
    st.integers(0, 50),
    st.integers(100, 400),
    st.floats(0, 1),
    st.floats(0.6, 1),
)
def test_rates_rise_and_then_fall_without_a_jump(
    kind: str, warmup: int, steps: int, decay_to: float, decay_at: float
) -> None:
    schedule = Schedule(kind, 1.0, warmup, steps, decay_to, decay_at)
    found = [schedule.lr_at(step) for step in range(steps + 10)]
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert max(found) == 1
    assert found[-1] == decay_to
    jumps = [abs(b - a) for a, b in zip(found[warmup:], found[warmup + 1 :], strict=False)]
    assert max(jumps) <= math.pi / 2 / (decay_at * steps - warmup) + 1e-9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cosine"}, "schedule.kind: expected 'paper' or 'linear' or 'constant', got"),
        ({"lr": 0.0}, "schedule.lr: expected a finite number over 0, got 0"),
        ({"lr": math.inf}, "schedule.lr: expected a finite number over 0, got inf"),
        ({"steps": 0}, "schedule.steps: expected at least 1, got 0"),
        ({"warmup": -1}, "schedule.warmup: expected at least 0, got -1"),
        ({"decay_to": 1.5}, "schedule.decay_to: expected a number from 0 to 1, got 1.5"),
        ({"decay_at": 0.0}, "schedule.decay_at: expected a number over 0 and up to 1, got 0"),
        ({"steps": 2000}, r"schedule.warmup: expected fewer than the 1800 steps .*, got 2000"),
    ],
)
def test_bad_schedules_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Schedule(**settings)


def small_model() -> NeoBERTForMaskedLM:
    return NeoBERTForMaskedLM(
        NeoBERTConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24,
        )
    )  # fmt: skip


def test_norms_and_biases_do_not_decay() -> None:
    model = small_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = parameter_groups(model, Optimizer())
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)].rpartition("norm.")[2] for p in kept["params"]} == {
        "weight",
        "decoder.bias",
    }
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in kept["params"])
    everything = [names[id(p)] for group in (decayed, kept) for p in group["params"]]
    assert sorted(everything) == sorted(names.values())
    assert "model.encoder.weight" in {names[id(p)] for p in decayed["params"]}


def test_the_published_codes_decay_is_a_setting() -> None:
    (group,) = parameter_groups(small_model(), Optimizer(weight_decay=0.01, decay="all"))
    assert (group["weight_decay"], len(group["params"])) == (0.01, 16)


def test_a_tied_weight_comes_once_and_a_frozen_one_never() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "rest": nn.Linear(3, 3)}
    )
    model["head"].weight = model["embed"].weight
    model["rest"].requires_grad_(False)
    decayed, kept = parameter_groups(model, Optimizer())
    assert [p is model["embed"].weight for p in decayed["params"]] == [True]
    assert [p is model["head"].bias for p in kept["params"]] == [True]
    with pytest.raises(InputError, match="model: expected a parameter to train, got none"):
        build(model.requires_grad_(False), Optimizer())


def test_steps_are_those_of_adamw_written_out() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    settings = Optimizer(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
    optimizer = build(model, settings)
    expected = [p.detach().clone() for p in (model.weight, model.bias)]
    first = [torch.zeros_like(p) for p in expected]
    second = [torch.zeros_like(p) for p in expected]
    for step in range(1, 4):
        lr = 0.1 / step
        for i, p in enumerate((model.weight, model.bias)):
            p.grad = torch.randn_like(p)
            expected[i] *= 1 - lr * (0.3, 0.0)[i]
            first[i] = 0.8 * first[i] + 0.2 * p.grad
            second[i] = 0.9 * second[i] + 0.1 * p.grad**2
            root = (second[i] / (1 - 0.9**step)).sqrt() + 1e-6
            expected[i] -= lr * first[i] / (1 - 0.8**step) / root
        set_lr(optimizer, lr)
        optimizer.step()
    for p, value in zip((model.weight, model.bias), expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta2": 1.0}, "optimizer.beta2: expected a number from 0 to under 1, got 1"),
        ({"eps": 0.0}, "optimizer.eps: expected a finite number over 0, got 0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay: expected at least 0, got -0.1"),
        ({"clip": -1.0}, "optimizer.clip: expected at least 0, got -1"),
        ({"decay": "none"}, "optimizer.decay: expected 'weights' or 'all', got 'none'"),
    ],
)
def test_bad_settings_of_the_optimizer_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Optimizer(**settings)
