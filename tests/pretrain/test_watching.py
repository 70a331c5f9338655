"""The log survives kills, the guard knows a spike from noise, utilisation counts every product."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from neobert import NeoBERTConfig
from neobert.heads import NeoBERTForMaskedLM
from neobert.pretraining import log
from neobert.pretraining.guard import LEAST, Guard, Limits
from neobert.pretraining.utilisation import (
    model_flops_per_token,
    peak_flops,
    peak_of,
    utilisation,
)
from neobert.readers import InputError


def steps_of(folder: Path) -> list[int]:
    return [record["step"] for record in log.read(folder)]


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    with log.Log(tmp_path / "run") as run:
        run.write(step=1, loss=0.1 + 0.2, lr=6e-4, utilisation=None)
        run.write(step=1, kind="note", text="line\nend \u2028")
    first, second = log.read(tmp_path / "run")
    assert first.pop("time") <= second.pop("time")
    assert first == {"kind": "train", "step": 1, "loss": 0.1 + 0.2, "lr": 6e-4, "utilisation": None}
    assert second == {"kind": "note", "step": 1, "text": "line\nend \u2028"}


def test_a_number_that_json_lacks_is_null(tmp_path: Path) -> None:
    with log.Log(tmp_path) as run:
        run.write(step=1, loss=math.nan, grad_norm=math.inf)
    (record,) = log.read(tmp_path)
    assert (record["loss"], record["grad_norm"]) == (None, None)
    json.loads((tmp_path / log.NAME).read_text(), parse_constant=pytest.fail)


def test_a_line_torn_anywhere_is_cut_and_the_rest_stays(tmp_path: Path) -> None:
    with log.Log(tmp_path) as run:
        for step in (1, 2, 3):
            run.write(step=step, loss=1.0)
    whole = (tmp_path / log.NAME).read_bytes()
    start = whole.rfind(b"\n", 0, -1) + 1
    for end in range(start, len(whole)):
        (tmp_path / log.NAME).write_bytes(whole[:end])
        assert steps_of(tmp_path) == [1, 2]
        with log.Log(tmp_path) as run:
            run.write(step=7)
        assert steps_of(tmp_path) == [1, 2, 7]


def test_a_record_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    run = log.Log(tmp_path)
    run.write(step=1)
    assert steps_of(tmp_path) == [1]
    run.close()
    run.close()


def test_a_resumed_run_drops_what_it_makes_again(tmp_path: Path) -> None:
    with log.Log(tmp_path) as run:
        for step in (1, 2, 2, 3):
            run.write(step=step)
        run.truncate(2)
        run.write(step=3, loss=5.0)
    assert steps_of(tmp_path) == [1, 2, 2, 3]
    assert log.read(tmp_path)[-1]["loss"] == 5.0
    assert [path.name for path in tmp_path.iterdir()] == [log.NAME]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"kind": "train"}', '{"step": "1"}'])
def test_a_foreign_line_is_named_and_kept(line: str, tmp_path: Path) -> None:
    content = f'{{"step": 1}}\n{line}\n'
    (tmp_path / log.NAME).write_text(content)
    for use in (log.Log, log.read):
        with pytest.raises(InputError, match=r"log: .*log.jsonl:2: expected an object with a step"):
            use(tmp_path)
    assert (tmp_path / log.NAME).read_text() == content


def test_a_folder_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"log: expected a run folder with log.jsonl, got .*none"):
        log.read(tmp_path / "none")


def falling(count: int, noise: float = 0.05) -> list[float]:
    draw = np.random.default_rng(0)
    return [2 + 8 * math.exp(-i / 50) + float(draw.normal()) * noise for i in range(count)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stops_at_once(value: float) -> None:
    guard = Guard(Limits(spike=0.0))
    assert guard.check(0, 10.0, 1.0) is None
    assert guard.check(1, value, 1.0) == f"step 1: the loss is {value}"
    assert guard.check(1, 2.0, value) == f"step 1: the gradient norm is {value}"


def test_a_falling_noisy_loss_does_not_stop() -> None:
    guard = Guard(Limits())
    assert [guard.check(i, x, 1.0) for i, x in enumerate(falling(1000, 0.3))] == [None] * 1000


def test_a_spike_stops_and_says_how_high_it_is() -> None:
    guard = Guard(Limits())
    for step, loss in enumerate(falling(1000)):
        guard.check(step, loss, 1.0)
    reason = guard.check(1000, 7.0, 1.0)
    assert reason is not None
    assert reason.startswith("step 1000: the loss is 7, 3.5 times the median of the last 200 (1.99")


def test_noise_as_wide_as_its_median_is_no_spike() -> None:
    guard = Guard(Limits(spike=1.5))
    draw = np.random.default_rng(0)
    for step in range(500):
        assert guard.check(step, float(draw.uniform(0.5, 1.5))) is None
    assert guard.check(500, 1.6) is None  # over 1.5 times the median
    assert guard.check(501, 8.0) is not None


def test_the_skewed_noise_of_a_loss_near_zero_is_no_spike() -> None:
    guard = Guard(Limits())
    draw = np.random.default_rng(0)
    losses = 0.002 * np.exp(1.5 * draw.normal(size=2000))
    assert losses.max() > 50 * np.median(losses)
    assert {guard.check(i, loss) for i, loss in enumerate(losses.tolist())} == {None}
    assert guard.check(2000, 0.6) is not None


def test_patience_waits_for_spikes_in_a_row() -> None:
    guard = Guard(Limits(patience=3))
    for step in range(LEAST):
        guard.check(step, 2.0 + step % 2 / 100)
    found = [guard.check(0, loss) is None for loss in (9.0, 9.0, 2.0, 9.0, 9.0, 9.0)]
    assert found == [True, True, True, True, True, False]


def test_a_few_first_losses_have_no_median() -> None:
    guard = Guard(Limits())
    assert [guard.check(i, float(10**i)) for i in range(5)] == [None] * 5


def test_a_resumed_guard_decides_as_the_first_one() -> None:
    losses = [*falling(300), 2.5, 8.5, 8.3, 8.6, 2.1]
    whole, first = Guard(Limits(patience=2)), Guard(Limits(patience=2))
    expected = [whole.check(i, loss) for i, loss in enumerate(losses)]
    for cut in (0, 5, 100, 301, 302):
        first = Guard(Limits(patience=2))
        for step, loss in enumerate(losses[:cut]):
            first.check(step, loss)
        again = Guard(Limits(patience=2))
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [again.check(cut + i, x) for i, x in enumerate(losses[cut:])] == expected[cut:]
    assert any(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spike": 1.0}, "guard.spike: expected a finite number over 1, or 0, got 1"),
        ({"window": 3}, f"guard.window: expected at least {LEAST}, got 3"),
        ({"patience": 0}, "guard.patience: expected at least 1, got 0"),
    ],
)
def test_bad_limits_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Limits(**settings)


@pytest.mark.parametrize("last_layer_at_labels", [False, True])
def test_flop_are_those_that_torch_counts(last_layer_at_labels: bool) -> None:
    config = NeoBERTConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=96, attn_implementation="eager",
    )  # fmt: skip
    model = NeoBERTForMaskedLM(config)
    ids = torch.randint(5, 96, (2, 12))
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids, labels=ids).loss.backward()
    found = model_flops_per_token(
        config, context=12, labelled=1.0, last_layer_at_labels=last_layer_at_labels
    )
    # The first layer's input needs a gradient, so nothing of the backward is left out.
    assert found * ids.numel() == counter.get_total_flops()


def test_unlabelled_tokens_cost_no_head_and_less_of_the_last_layer() -> None:
    config = NeoBERTConfig()
    behind = 7_079_424 - 2 * 768 - 3 * 768**2
    full = model_flops_per_token(config, 0, labelled=1.0)
    assert full == 6 * (28 * (7_079_424 - 2 * 768) + 768 * 30_522)
    less = model_flops_per_token(config, 0, labelled=0.2)
    assert full - less == pytest.approx(6 * 0.8 * (behind + 768 * 30_522))
    here = model_flops_per_token(config, 0, labelled=0.2, last_layer_at_labels=False)
    assert here - less == pytest.approx(6 * 0.8 * behind)
    longer = model_flops_per_token(config, 1024, labelled=1.0)
    assert longer - full == 6 * 28 * 2 * 768 * 1024


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA GeForce RTX 4080", None),
    ],
)
def test_peaks_are_known_by_the_drivers_name(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_a_share_needs_a_known_peak() -> None:
    assert peak_flops("cpu") is None
    assert utilisation(1e9, 1e5, None) is None
    assert utilisation(1e9, 1e5, 1e15, devices=2) == pytest.approx(0.05)
