"""NeoBERT in the hands of others: checkpointing, PEFT, Trainer, torch.compile, device maps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from neobert_oracle import Shape
from parity import assert_within_budget
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import neobert_kernels as nk
from neobert import (
    NeoBERTConfig,
    NeoBERTForMaskedLM,
    NeoBERTForSequenceClassification,
    NeoBERTForTokenClassification,
    NeoBERTModel,
    NeoBERTTokenizer,
)

LINEARS = ["qkv", "wo", "w12", "w3"]


def gradients(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same_gradients(
    layout: str,
    reentrant: bool,
    model: NeoBERTForMaskedLM,
    ids: Tensor,
    mask: Tensor,
    packed: dict[str, Any],
):
    inputs = {"input_ids": ids, "attention_mask": mask} if layout == "padded" else packed
    inputs["labels"] = inputs["input_ids"]
    model.train()
    plain = gradients(model, **inputs)
    assert plain.keys() == dict(model.named_parameters()).keys()
    assert all(grad.isfinite().all() and grad.any() for grad in plain.values())
    calls: list[int] = []
    for layer in model.model.transformer_encoder:
        layer.ffn.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = gradients(model, **inputs)
    assert len(calls) == 2 * Shape().layers
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, msg=name)


def test_lora_trains_its_adapters_alone(folder: Path, ids: Tensor, mask: Tensor, tmp_path: Path):
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=2, target_modules=LINEARS, task_type="SEQ_CLS", init_lora_weights=False, lora_dropout=0.0
    )
    base = NeoBERTForSequenceClassification.from_pretrained(folder, num_labels=3)
    before = base(ids, mask).logits
    model = get_peft_model(base, config)
    adapted = len({n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_A" in n})
    assert adapted == len(LINEARS) * Shape().layers
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0])}
    named = gradients(model, **inputs)
    assert all("lora_" in name or "classifier" in name for name in named)
    assert sum("lora_" in name for name in named) == 2 * adapted
    model.eval().save_pretrained(str(tmp_path))
    after = model(**inputs).logits
    assert not torch.allclose(after, before, atol=1e-2)
    fresh = NeoBERTForSequenceClassification.from_pretrained(folder, num_labels=3)
    reloaded: Any = PeftModel.from_pretrained(fresh, str(tmp_path))
    reloaded.base_model.model.dense.load_state_dict(base.dense.state_dict())
    torch.testing.assert_close(reloaded(**inputs).logits, after)
    torch.testing.assert_close(reloaded.merge_and_unload()(**inputs).logits, after)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_an_adapter_with_the_whole_head_reloads_to_equal_logits(
    task: str, folder: Path, ids: Tensor, mask: Tensor, tmp_path: Path
):
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=2, target_modules=LINEARS, task_type=task, modules_to_save=["dense", "classifier"]
    )
    kind: Any = {
        "SEQ_CLS": NeoBERTForSequenceClassification,
        "TOKEN_CLS": NeoBERTForTokenClassification,
    }[task]
    model = get_peft_model(kind.from_pretrained(folder, num_labels=3), config).train()
    labels = torch.tensor([0, 1, 2, 0]) if task == "SEQ_CLS" else ids % 3
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    named = gradients(model, **inputs)
    assert {n.split(".")[-1] for n, g in named.items() if ".dense." in n and g.any()} == {
        "weight", "bias",
    }  # fmt: skip
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    model.eval().save_pretrained(str(tmp_path))
    expected = model(**inputs).logits
    torch.manual_seed(1)
    fresh: Any = PeftModel.from_pretrained(
        kind.from_pretrained(folder, num_labels=3), str(tmp_path)
    )
    assert torch.equal(fresh(**inputs).logits, expected)
    nk.patch(fresh)
    kept = mask.bool() if task == "TOKEN_CLS" else ...
    torch.testing.assert_close(fresh(**inputs).logits[kept], expected[kept])


def test_lora_on_the_encoder_gives_features(folder: Path, ids: Tensor, mask: Tensor):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=LINEARS, task_type="FEATURE_EXTRACTION")
    encoder = NeoBERTModel.from_pretrained(folder)
    expected = encoder(ids, mask).last_hidden_state
    model = get_peft_model(encoder, config).eval()
    assert torch.equal(model(input_ids=ids, attention_mask=mask).last_hidden_state, expected)


def test_trainer_learns_masked_words(folder: Path, tmp_path: Path):
    tokenizer = NeoBERTTokenizer.from_pretrained(folder)
    texts = ["the cat sat on the mat.", "a dog ran?", "happy trees. the dog sat on a cat."] * 4
    model = NeoBERTForMaskedLM.from_pretrained(folder)
    before = model.model.transformer_encoder[0].qkv.weight.detach().clone()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            logging_steps=1,
            save_steps=3,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=0),
        train_dataset=[{"input_ids": tokenizer(text)["input_ids"]} for text in texts],
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
    assert not torch.equal(model.model.transformer_encoder[0].qkv.weight, before)
    saved = NeoBERTForMaskedLM.from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(saved.decoder.bias, model.decoder.bias)


@pytest.mark.parametrize("reduced", [False, True])
def test_training_after_loading_is_finite(reduced: bool, folder: Path, ids: Tensor, mask: Tensor):
    """transformers builds the model on the meta device: state it cannot fill would be garbage."""
    dtype = torch.bfloat16 if reduced else torch.float32
    model = NeoBERTForMaskedLM.from_pretrained(folder, dtype=dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_model_made_on_the_meta_device_needs_only_its_weights(
    folder: Path, model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor
):
    with torch.device("meta"):
        empty = NeoBERTForMaskedLM(NeoBERTConfig.from_pretrained(folder))
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    assert torch.equal(filled.eval()(ids, mask).logits, model(ids, mask).logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_device_maps(device_map: Any, dtype: torch.dtype, folder: Path, ids: Tensor):
    model = NeoBERTForMaskedLM.from_pretrained(folder, device_map=device_map, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = NeoBERTForMaskedLM.from_pretrained(folder, dtype=dtype)(ids.to(model.device)).logits
    assert torch.equal(model(ids.to(model.device)).logits, expected.to(model.device))


def test_padded_batches_compile_to_one_graph(
    model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor, exact: dict, rounded: dict
):
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    assert_within_budget(compiled(ids, mask).logits, rounded["logits"], exact["logits"])
    for shape in ((3, 12), (7, 30)):
        more = torch.randint(1, Shape().vocab, shape)
        real = torch.ones_like(more)
        real[0, 5:] = 0
        torch.testing.assert_close(compiled(more, real).logits, model(more, real).logits)
    assert len(graphs) == 1


def test_the_compiled_backward_gives_the_same_gradients(folder: Path, ids: Tensor, mask: Tensor):
    model = NeoBERTForMaskedLM.from_pretrained(folder, num_hidden_layers=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    plain = gradients(model, **inputs)
    model.compile(fullgraph=True, backend="aot_eager")
    for name, grad in gradients(model, **inputs).items():
        torch.testing.assert_close(grad, plain[name], msg=name)
