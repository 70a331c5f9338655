"""The cost model counts what models really multiply, and the bytes that a hand counts."""

import pytest
import torch
from encoders import ENCODERS
from torch.utils.flop_counter import FlopCounterMode

from neobert.cli import main
from neobert.floors import ARCHITECTURES, GPUS, Cost, forward, operators, training_step
from neobert.floors.gpus import gpu
from neobert.floors.models import architecture, backward, of_config

B, S = 3, 20
FAMILIES = pytest.mark.parametrize("family", ENCODERS)


def products(parts):
    """FLOP on matrix units, Linear layers and the decoder apart from attention."""
    found = {"attention": 0, "linear": 0}
    for part in parts:
        if part.cost.matrix:
            found["attention" if "attention" in part.operator.split(",")[0] else "linear"] += (
                part.cost.flop
            )
    return found


def counted(model, ids, training):
    """The same from torch's own counter: products of two matrices, and those of batches."""
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=ids)[0]
        if training:
            out.sum().backward()
    flop = counter.get_flop_counts()["Global"]
    aten = torch.ops.aten
    return {
        "attention": flop.get(aten.bmm, 0) + flop.get(aten.baddbmm, 0),
        "linear": flop.get(aten.mm, 0) + flop.get(aten.addmm, 0),
    }


@FAMILIES
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
def test_matrix_flop_are_those_that_torch_counts(family, training):
    """Every row is labelled, and no window: what the classes compute on a full batch."""
    encoder = ENCODERS[family]
    model = encoder.head("mlm", attn_implementation="eager")
    ids = torch.randint(2, 90, (B, S))
    shape = of_config(model.config)
    if shape.window is not None:
        shape = type(shape)(**{**vars(shape), "window": None})
    expected = counted(model, ids, training)
    actual = products(forward(shape, [S] * B, "float32", labelled=B * S))
    if training:
        behind = products(backward(shape, [S] * B, "float32", labelled=B * S))
        actual["linear"] += behind["linear"]
        # Eager attention keeps its scores: four products where a fused backward has five.
        actual["attention"] += behind["attention"] * 4 // 5
    if family == "neobert":  # its own attention, not transformers' eager one
        actual["attention"] = expected["attention"]
    assert actual["linear"] == expected["linear"]
    # Some versions of transformers make RoPE's angles by a product of vectors.
    assert actual["attention"] == pytest.approx(expected["attention"], rel=0.01)


@FAMILIES
def test_parameters_are_those_of_the_model(family):
    model = ENCODERS[family].head("mlm")
    base = getattr(model, model.base_model_prefix)
    shape = of_config(model.config)
    pooler = getattr(base, "pooler", None)
    assert shape.parameters() == sum(p.numel() for p in base.parameters()) - (
        sum(p.numel() for p in pooler.parameters()) if pooler is not None else 0
    )
    assert shape.parameters(head=True) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["bert-base", "nomic-bert-base", "modernbert-base"])
def test_named_architectures_are_the_classes_defaults(name):
    family = name.removesuffix("-base").replace("-", "_")
    config = type(ENCODERS[family].config())()
    assert vars(of_config(config)) | {"name": name} == vars(ARCHITECTURES[name])


def test_neobert_has_the_parameters_of_the_release():
    shape = ARCHITECTURES["neobert-250m"]
    assert (shape.parameters(), shape.parameters(head=True)) == (221_665_536, 245_136_954)


@pytest.mark.parametrize("n", [0, 1, 2, 7])
@pytest.mark.parametrize("window", [None, 0, 1, 6, 7, 9])
def test_pairs_are_counted_one_by_one(n, window):
    near = [(i, j) for i in range(n) for j in range(n) if window is None or abs(i - j) <= window]
    assert operators.pairs([n, n], window) == 2 * len(near)


def test_bytes_are_those_counted_by_hand():
    """Two rows of width 8 and so on, in bfloat16: small enough to count on paper."""
    assert operators.linear(2, 8, 4, 2, bias=True).bytes == 2 * (16 + 8 + 32 + 4)
    assert operators.linear_backward(2, 8, 4, 2).bytes == 2 * (8 + 16 + 32 + 16 + 32)
    assert operators.fused_linear(2, 8, 4, 2, bias=True) == operators.linear(2, 8, 4, 2, bias=True)
    parts = {"added": True, "normed": True, "gated": True}
    # x, residual, h and u; two columns of y; the product's weights and the norm's
    assert operators.fused_linear(2, 8, 4, 2, **parts).bytes == 2 * (4 * 16 + 4 + 32 + 8)
    rms = {"added": False, "centered": False}
    assert operators.norm(2, 8, 2, **rms).bytes == 2 * (16 + 16 + 8)
    assert operators.norm_backward(2, 8, 2, **rms).bytes == 2 * (3 * 16 + 2 * 8)
    layer = {"added": True, "centered": True, "bias": True}
    assert operators.norm(2, 8, 2, **layer).bytes == 2 * (4 * 16 + 2 * 8)
    assert operators.gated_unit(2, 8, 2).bytes == 2 * (2 * 16 + 8 * 2)
    assert operators.gated_unit_backward(2, 8, 2).bytes == 2 * 5 * 16
    assert operators.rope(2, 3, 4, 2).bytes == 2 * 2 * 24 + 4 * 2 * 4
    heads = {"kv_heads": 1, "rotary": True}
    # q and out of three heads, k and v of one; a float32 for every row and head; cos and sin
    assert operators.attention([2], 3, 4, 2, **heads).bytes == 2 * (48 + 16) + 4 * (6 + 8)
    assert operators.linear_cross_entropy(5, 2, 8, 10, 2).bytes == 2 * (16 + 80) + 40 + 8
    assert operators.mean_pool(5, 2, 8, 2).bytes == 2 * (40 + 16) + 12
    assert operators.first_pool(2, 8, 2).bytes == 2 * 32 + 12
    assert operators.info_nce(2, 3, 8, 2).bytes == 2 * 40 + 8
    assert operators.adamw(10).bytes == 280


def test_a_floor_is_the_slowest_unit():
    on = GPUS["h200"]
    moved = Cost(bytes=4_800_000)
    assert moved.floor_s(on) == pytest.approx(1e-6)
    assert moved.bound(on) == "memory"
    product = Cost(bytes=1, flop=989_400_000, matrix=True)
    assert product.floor_s(on) == pytest.approx(1e-6)
    assert product.floor_s(on, "float32") == pytest.approx(989.4 / 66.9 * 1e-6)
    assert product.bound(on) == "matrix"


def test_a_window_costs_less_only_past_its_width():
    model = architecture("modernbert-base")

    def scores(n):
        return {p.operator: p.cost.flop / p.calls for p in forward(model, [n])}

    assert scores(60)["attention, local"] == scores(60)["attention"]
    assert scores(4096)["attention, local"] < scores(4096)["attention"] / 30


def test_a_step_is_forward_backward_and_optimizer():
    model = architecture("neobert-250m")
    parts = training_step(model, [512] * 4)
    assert len({part.name for part in parts}) == len(parts)
    linear = {False: 0, True: 0}
    for part in parts:
        if part.operator.startswith("Linear"):
            linear[part.backward] += part.cost.flop
    assert linear[True] == 2 * linear[False]
    loss = [p.cost.flop for p in parts if p.operator == "linear_cross_entropy"]
    assert loss == [k * round(0.2 * 2048) * 768 * 30_522 for k in (2, 4)]


def test_behind_the_last_attention_only_labelled_rows_go_on():
    """The same FLOP as the training loop's own count of its utilisation."""
    from neobert import NeoBERTConfig
    from neobert.pretraining.utilisation import model_flops_per_token

    lengths = [512, 100, 33]
    T = sum(lengths)
    labelled = T // 5
    parts = training_step(architecture("neobert-250m"), lengths, labelled=labelled)
    flop = sum(p.cost.flop for p in parts if p.cost.matrix)
    flop -= sum(p.cost.flop for p in parts if p.name == "attention, backward") // 5  # formed again
    context = sum(n * n for n in lengths) / T
    expected = T * model_flops_per_token(NeoBERTConfig(), context, labelled=labelled / T)
    assert flop == pytest.approx(expected, rel=1e-12)


def test_bad_values_name_the_rule():
    model = architecture("bert-base")
    with pytest.raises(ValueError, match=r"model: expected one of .*neobert-250m.*, got 'x'"):
        architecture("x")
    with pytest.raises(ValueError, match=r"gpu: expected one of a100, .*, got 'x'"):
        gpu("x")
    with pytest.raises(ValueError, match=r"labelled: expected 0 to 8 .*, got 9"):
        forward(model, [8], labelled=9)
    with pytest.raises(ValueError, match=r"lengths: expected no negative number, got -1"):
        forward(model, [-1])
    with pytest.raises(ValueError, match=r"dtype: expected one of .*, got 'int8'"):
        forward(model, [8], "int8")


def test_the_command_prints_floors_and_shares(capsys):
    assert main(["bench", "--floor", "--gpu", "l4", "--length", "512", "--model", "bert-base"]) == 0
    out = capsys.readouterr().out
    assert "bert-base, forward, bfloat16" in out
    shares = [float(word[:-1]) for word in out.split() if word.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.6)
    assert main(["bench", "--floor", "--tokens", "100"]) == 2
    assert "tokens: expected at least the length 512, got 100" in capsys.readouterr().err
    assert main(["bench", "--floor", "--gpu", "h300"]) == 2
    assert "gpu: expected one of" in capsys.readouterr().err
