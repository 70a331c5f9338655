"""`import neobert` makes transformers' Auto classes, tokenizers and pipelines work on NeoBERT."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from neobert_oracle import Shape
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline

import neobert

KIND_OF_AUTO = {
    "AutoModel": neobert.NeoBERTModel,
    "AutoModelForMaskedLM": neobert.NeoBERTForMaskedLM,
    "AutoModelForSequenceClassification": neobert.NeoBERTForSequenceClassification,
    "AutoModelForTokenClassification": neobert.NeoBERTForTokenClassification,
    "AutoModelForQuestionAnswering": neobert.NeoBERTForQuestionAnswering,
}


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
@pytest.mark.parametrize("auto", KIND_OF_AUTO)
def test_our_class_loads_and_no_remote_code_runs(auto: str, trust_remote_code: Any, folder: Path):
    """The folder's model.py raises when it is imported."""
    load = getattr(transformers, auto)
    model = load.from_pretrained(folder, trust_remote_code=trust_remote_code)
    assert type(model) is KIND_OF_AUTO[auto]
    assert type(load.from_config(model.config, trust_remote_code=trust_remote_code)) is type(model)


@pytest.mark.parametrize(
    "imports",
    [
        "import neobert; from transformers import AutoConfig, AutoModel",
        "from neobert import NeoBERTModel; from transformers import AutoConfig, AutoModel",
    ],
)
def test_registered_also_when_neobert_is_imported_first(imports: str):
    made = (
        "AutoModel.from_config(AutoConfig.for_model('neobert', num_hidden_layers=0, vocab_size=2))"
    )
    code = f"{imports}; print(type({made}).__module__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "neobert.model"


def test_a_code_map_into_another_repository_is_not_followed(folder: Path, tmp_path: Path):
    """Fine-tuned checkpoints point at chandar-lab/NeoBERT--model.NeoBERT; no network here."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {k: f"chandar-lab/NeoBERT--{v}" for k, v in config["auto_map"].items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert (
        type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)) is neobert.NeoBERTConfig
    )
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(model) is neobert.NeoBERTModel


@pytest.mark.parametrize("kind", KIND_OF_AUTO.values())
def test_forward_has_the_order_of_transformers_and_takes_anything(kind: Any):
    parameters = inspect.signature(kind.forward).parameters
    assert list(parameters)[1:5] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "inputs_embeds",
    ]
    assert any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_the_model_imports_nothing_but_its_dependencies():
    """No xformers, no flash-attn: what is imported is installed with the package."""
    allowed = {"torch", "transformers", "safetensors", "neobert", "neobert_kernels"}
    package = Path(neobert.__file__).parent
    for name in ("__init__", "config", "model", "heads", "checkpoint", "tokenization"):
        for node in ast.walk(ast.parse((package / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            else:
                continue
            roots = {module.partition(".")[0] for module in imported}
            assert roots <= allowed | sys.stdlib_module_names, f"{name}.py imports {roots}"


def test_tokenizer_of_a_bare_vocabulary(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is neobert.NeoBERTTokenizer
    assert tokenizer.model_max_length == 4096
    encoded = tokenizer("The CATS sat.", "A dog", return_tensors="pt")
    assert list(encoded) == ["input_ids", "attention_mask"]
    words = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0].tolist())
    assert " ".join(words) == "[CLS] the cat ##s sat . [SEP] a dog [SEP]"
    special = ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    assert [getattr(tokenizer, name) for name in special] == [0, 100, 101, 102, 103]


def test_tokenizer_round_trip_keeps_the_length(folder: Path, tmp_path: Path):
    tokenizer = neobert.NeoBERTTokenizer.from_pretrained(folder, model_max_length=7)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is neobert.NeoBERTTokenizer
    assert again.model_max_length == 7
    ids = again("the cat sat on the mat on the mat", truncation=True)["input_ids"]
    assert len(ids) == 7
    assert ids == tokenizer("the cat sat on the", truncation=True)["input_ids"]


def test_tokenizer_of_the_bert_family_works_too(
    folder: Path, tmp_path: Path, model: neobert.NeoBERTForMaskedLM
):
    """A repository that names BertTokenizer gets it, token types and all."""
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 512}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    encoded = tokenizer("the cat", "a dog", return_tensors="pt")
    assert "token_type_ids" in encoded
    types = encoded.pop("token_type_ids")
    assert torch.equal(model(**encoded, token_type_ids=types).logits, model(**encoded).logits)


def test_fill_mask_pipeline(folder: Path, model: neobert.NeoBERTForMaskedLM):
    fill: Any = pipeline("fill-mask", model=str(folder), device="cpu")
    assert type(fill.model) is neobert.NeoBERTForMaskedLM
    found = fill("the cat [MASK] on the mat.", top_k=Shape().vocab)
    encoded = fill.tokenizer("the cat [MASK] on the mat.", return_tensors="pt")
    expected = model(**encoded).logits[0, 3].softmax(-1).detach()
    best = int(expected.argmax())
    assert found[0]["token"] == best
    assert found[0]["score"] == pytest.approx(float(expected[best]), rel=1e-4)


def test_feature_extraction_pipeline(folder: Path, model: neobert.NeoBERTForMaskedLM):
    extract: Any = pipeline("feature-extraction", model=str(folder), device="cpu")
    features = extract("the cat sat", return_tensors=True)
    encoded = extract.tokenizer("the cat sat", return_tensors="pt")
    torch.testing.assert_close(features, model.model(**encoded).last_hidden_state)


def test_published_architecture_name_is_no_obstacle(folder: Path, tmp_path: Path):
    assert AutoConfig.from_pretrained(folder).architectures == ["NeoBERTLMHead"]
    neobert.NeoBERTForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["NeoBERTForMaskedLM"]
