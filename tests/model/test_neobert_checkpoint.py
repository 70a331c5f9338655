"""Published checkpoints load unchanged and save back byte for byte; errors name the tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import neobert_oracle as oracle
import pytest
import torch
from neobert_oracle import Shape
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from neobert import (
    NeoBERTConfig,
    NeoBERTForMaskedLM,
    NeoBERTForQuestionAnswering,
    NeoBERTForSequenceClassification,
    NeoBERTForTokenClassification,
    NeoBERTModel,
)

CLASS_OF_HEAD = [
    ("none", NeoBERTModel),
    ("lm", NeoBERTForMaskedLM),
    ("classes", NeoBERTForSequenceClassification),
    ("classes", NeoBERTForTokenClassification),
    ("answer", NeoBERTForQuestionAnswering),
]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("head", "kind"), CLASS_OF_HEAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_round_trip_keeps_every_tensor(head: str, kind: Any, dtype: torch.dtype, tmp_path: Path):
    weights = oracle.draw(Shape(), head)
    published = oracle.write(tmp_path / "published", Shape(), weights, dtype)
    kind.from_pretrained(published, num_labels=Shape().labels).save_pretrained(tmp_path / "saved")
    before, after = tensors(published), tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype, name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def test_the_encoder_of_a_language_model_loads_alone(folder: Path):
    encoder = AutoModel.from_pretrained(folder).state_dict()
    published = tensors(folder)
    assert {f"model.{name}" for name in encoder} | {"decoder.weight", "decoder.bias"} == set(
        published
    )
    assert all(torch.equal(encoder[name], published[f"model.{name}"]) for name in encoder)


@pytest.mark.parametrize("source", ["lm", "none"])
def test_a_new_head_starts_on_the_published_encoder(
    source: str, head_folder: Callable[[str], Path]
):
    model = AutoModelForSequenceClassification.from_pretrained(head_folder(source), num_labels=5)
    published = tensors(head_folder(source))
    for name, tensor in model.model.state_dict().items():
        prefix = "model." if source == "lm" else ""
        assert torch.equal(tensor, published[prefix + name]), name
    assert model.classifier.weight.shape == (5, Shape().width)
    assert 0.015 < float(model.classifier.weight.detach().abs().max()) <= 0.02


@pytest.mark.parametrize(
    "name",
    [
        "model.encoder.weight",
        "model.transformer_encoder.1.qkv.weight",
        "model.transformer_encoder.2.ffn.w3.weight",
        "model.layer_norm.weight",
        "decoder.weight",
        "decoder.bias",
    ],
)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path, weights: dict):
    short = {key: tensor for key, tensor in weights.items() if key != name}
    folder = oracle.write(tmp_path / "short", Shape(), short)
    with pytest.raises(ValueError, match=f"checkpoint .*short: expected {name}, got none$"):
        NeoBERTForMaskedLM.from_pretrained(folder)
    if name.startswith("model."):
        inner = name.removeprefix("model.")
        with pytest.raises(ValueError, match=f"checkpoint .*short: expected {inner}, got none$"):
            AutoModel.from_pretrained(folder)


def test_many_missing_tensors_are_counted(tmp_path: Path, weights: dict):
    short = {key: tensor for key, tensor in weights.items() if ".1." not in key}
    folder = oracle.write(tmp_path, Shape(), short)
    with pytest.raises(ValueError, match=r"encoder\.1\..*, got none \(and 5 more such tensors\)$"):
        NeoBERTForMaskedLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.transformer_encoder.0.wo.weight", "decoder.weight"])
def test_a_misshapen_tensor_is_named_with_both_shapes(name: str, tmp_path: Path, weights: dict):
    bent = {**weights, name: weights[name][:-1].clone()}
    folder = oracle.write(tmp_path, Shape(), bent)
    rows = len(weights[name])
    rule = rf"expected {name} of shape \({rows}, 48\), got \({rows - 1}, 48\)$"
    with pytest.raises(ValueError, match=rule):
        NeoBERTForMaskedLM.from_pretrained(folder)


def test_another_number_of_classes_needs_a_word(head_folder: Callable[[str], Path]):
    folder = head_folder("classes")
    with pytest.raises(ValueError, match=r"classifier\.bias of shape \(7,\), got \(3,\)"):
        NeoBERTForSequenceClassification.from_pretrained(folder, num_labels=7)
    model = NeoBERTForSequenceClassification.from_pretrained(
        folder, num_labels=7, ignore_mismatched_sizes=True
    )
    assert model.classifier.weight.shape == (7, 48)
    assert torch.equal(model.dense.weight, tensors(folder)["dense.weight"])


def test_loading_info_comes_on_request(folder: Path):
    model, info = NeoBERTForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, NeoBERTForMaskedLM)
    assert not info["missing_keys"]


def test_a_file_cut_short_is_named(tmp_path: Path, weights: dict):
    folder = oracle.write(tmp_path / "cut", Shape(), weights)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match="cut: expected a complete safetensors file, got"):
        NeoBERTForMaskedLM.from_pretrained(folder)


def test_sharded_checkpoints_round_trip(folder: Path, tmp_path: Path):
    model = NeoBERTForMaskedLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = NeoBERTForMaskedLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_config_keeps_every_field_and_nests_nothing(folder: Path, tmp_path: Path):
    published = json.loads((folder / "config.json").read_text())
    published |= {"pretrained_model_name_or_path": "google-bert/bert-base-uncased", "note": [1, {}]}
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "config.json").write_text(json.dumps(published))
    for i in range(3):
        AutoConfig.from_pretrained(tmp_path / f"{i}").save_pretrained(tmp_path / f"{i + 1}")
    first, last = (json.loads((tmp_path / i / "config.json").read_text()) for i in "13")
    assert first == last
    published["dtype"] = published.pop("torch_dtype")  # transformers 5 renamed it
    del published["transformers_version"]
    assert {name: last[name] for name in published} == published


def test_model_saves_the_fields_it_does_not_know(folder: Path, tmp_path: Path):
    published = json.loads((folder / "config.json").read_text())
    for i in range(2):
        source = tmp_path / f"{i - 1}" if i else folder
        NeoBERTForMaskedLM.from_pretrained(source).save_pretrained(tmp_path / f"{i}")
    saved = json.loads((tmp_path / "1" / "config.json").read_text())
    for name in ("kwargs", "auto_map", "max_length", "norm_eps", "dim_head"):
        assert saved[name] == published[name], name


def test_the_defaults_are_the_release():
    config = NeoBERTConfig().to_dict()
    released = oracle.config(Shape(28, 768, 12, 3072, 30522, 4096))
    for name in ("architectures", "auto_map", "kwargs", "torch_dtype", "transformers_version"):
        del released[name]
    assert {name: config[name] for name in released} == released
    assert (config["rope_theta"], config["classifier_dropout"]) == (10000.0, 0.1)


def test_config_speaks_the_common_names():
    config = NeoBERTConfig(max_length=128)
    assert (config.max_position_embeddings, config.head_dim) == (128, 64)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(("nominal", "real"), [(3072, 2048), (70, 48), (60, 40), (100, 72)])
def test_feed_forward_width_is_two_thirds_up_to_a_multiple_of_8(nominal: int, real: int):
    assert NeoBERTConfig(intermediate_size=nominal).feed_forward_size == real


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 770}, r"hidden_size: expected .* = 12 \* 64, got 770"),
        ({"dim_head": 63}, r"hidden_size: expected .* = 12 \* 63, got 768"),
        ({"hidden_size": 36, "dim_head": 3}, "dim_head: expected an even size, got 3"),
        ({"vocab_size": 0}, "vocab_size: expected an integer of at least 1, got 0"),
        ({"hidden_size": "768"}, "hidden_size: expected an integer of at least 1, got '768'"),
        ({"intermediate_size": 1}, "intermediate_size: expected an integer of at least 2, got 1"),
        ({"norm_eps": -1.0}, r"norm_eps: expected a number of at least 0, got -1\.0"),
        ({"pad_token_id": 30522}, "pad_token_id: expected 0 to 30521, got 30522"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected False"),
    ],
)
def test_config_rejects(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        NeoBERTConfig(**fields)


def test_released_shape_has_the_released_parameters():
    with torch.device("meta"):
        model = NeoBERTForMaskedLM(NeoBERTConfig())
    assert sum(p.numel() for p in model.model.transformer_encoder[0].parameters()) == 7_079_424
    assert sum(p.numel() for p in model.model.parameters()) == 221_665_536
    assert sum(p.numel() for p in model.parameters()) == 245_136_954


def test_released_shape_has_the_released_names():
    with torch.device("meta"):
        state = NeoBERTForMaskedLM(NeoBERTConfig()).state_dict()
    layer = {
        "qkv.weight": (2304, 768),
        "wo.weight": (768, 768),
        "ffn.w12.weight": (4096, 768),
        "ffn.w3.weight": (768, 2048),
        "attention_norm.weight": (768,),
        "ffn_norm.weight": (768,),
    }
    expected = {
        "model.encoder.weight": (30522, 768),
        "model.layer_norm.weight": (768,),
        "decoder.weight": (30522, 768),
        "decoder.bias": (30522,),
    }
    for i in range(28):
        expected |= {f"model.transformer_encoder.{i}.{name}": size for name, size in layer.items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
