"""NeoBERT a second time, from its description alone: what the package's model is held against.

Nothing here imports neobert or neobert_kernels. `draw` makes random weights under the published
tensor names, `write` puts them into a folder as the release does, `forward` computes the model in
any dtype (float64: the exact answer), with at most one deliberate fault, so that a test can show
that it would notice it.

Source: Le Breton, Fournier, El Mezouar and Chandar 2025, arXiv:2502.19587; chandar-lab/NeoBERT.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "tree",
    "happy",
    "##s",
    "##ing",
    ".",
    "?",
]
FAULTS = (
    "plain_thirds",  # the qkv projection cut into three blocks instead of per head
    "half_split",  # rotary pairs (i, i + D/2) instead of (2i, 2i + 1)
    "value_first",  # w12's first half taken as the value
    "eps",  # 1e-6, the class default upstream, instead of 1e-5
    "no_final_norm",
    "tied_decoder",
    "no_decoder_bias",
    "no_mask",  # padding attended to
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the defaults are small, with a width that is no power of two."""

    layers: int = 3
    width: int = 48
    heads: int = 3
    intermediate: int = 70  # SwiGLU width 46, rounded up to 48
    vocab: int = 104 + len(WORDS)
    max_length: int = 64
    labels: int = 3

    @property
    def inner(self) -> int:
        return (2 * self.intermediate // 3 + 7) // 8 * 8


RELEASED_WIDTH = Shape(layers=2, width=768, heads=12, intermediate=3072, vocab=300)


def draw(shape: Shape, head: str = "lm", seed: int = 0) -> dict[str, Tensor]:
    """Weights under their published names, large enough that every part of the model shows.

    Embeddings stay at the release's initial range, where eps is a visible part of the mean square.
    ``head``: "lm", "classes", "answer", or "none": names without ``model.``, as a base model's.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, generator=generator)

    C, F = shape.width, shape.inner
    weights = {"encoder.weight": 0.04 * (torch.rand(shape.vocab, C, generator=generator) - 0.5)}
    for i in range(shape.layers):
        layer = f"transformer_encoder.{i}."
        weights[layer + "qkv.weight"] = normal(3 * C, C, scale=1.5 * C**-0.5)
        weights[layer + "wo.weight"] = normal(C, C, scale=C**-0.5)
        weights[layer + "ffn.w12.weight"] = normal(2 * F, C, scale=C**-0.5)
        weights[layer + "ffn.w3.weight"] = normal(C, F, scale=F**-0.5)
        weights[layer + "attention_norm.weight"] = 1 + normal(C, scale=0.3)
        weights[layer + "ffn_norm.weight"] = 1 + normal(C, scale=0.3)
    weights["layer_norm.weight"] = 1 + normal(C, scale=0.3)
    if head == "none":
        return weights
    weights = {f"model.{name}": tensor for name, tensor in weights.items()}
    if head == "lm":
        weights["decoder.weight"] = normal(shape.vocab, C, scale=C**-0.5)
        weights["decoder.bias"] = normal(shape.vocab)
    elif head == "classes":
        weights["dense.weight"] = normal(C, C, scale=C**-0.5)
        weights["dense.bias"] = normal(C)
        weights["classifier.weight"] = normal(shape.labels, C, scale=C**-0.5)
        weights["classifier.bias"] = normal(shape.labels)
    else:
        weights["qa_outputs.weight"] = normal(2, C, scale=C**-0.5)
        weights["qa_outputs.bias"] = normal(2)
    return weights


def config(shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """config.json in the form of the release, remote-code map and nested ``kwargs`` included."""
    return {
        "architectures": ["NeoBERTLMHead"],
        "auto_map": {
            "AutoConfig": "model.NeoBERTConfig",
            "AutoModel": "model.NeoBERT",
            "AutoModelForMaskedLM": "model.NeoBERTLMHead",
            "AutoModelForSequenceClassification": "model.NeoBERTForSequenceClassification",
        },
        "classifier_init_range": 0.02,
        "decoder_init_range": 0.02,
        "dim_head": shape.width // shape.heads,
        "embedding_init_range": 0.02,
        "hidden_size": shape.width,
        "intermediate_size": shape.intermediate,
        "kwargs": {
            "classifier_init_range": 0.02,
            "pretrained_model_name_or_path": "google-bert/bert-base-uncased",
            "trust_remote_code": True,
        },
        "max_length": shape.max_length,
        "model_type": "neobert",
        "norm_eps": 1e-05,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "pad_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.48.2",
        "vocab_size": shape.vocab,
    }


def write(
    folder: Path, shape: Shape, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> Path:
    """Write config.json, model.safetensors and vocab.txt, and a model.py that must never run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(shape, dtype), indent=2))
    tensors = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary = [SPECIAL.get(i, f"[unused{i}]") for i in range(104)] + WORDS
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "model.py").write_text("raise RuntimeError('remote code ran')\n")
    return folder


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotate(x: Tensor, first_position: int, fault: str | None) -> Tensor:
    """Rotate the pairs of the last axis of ``[B, S, H, D]`` by position times 10000^(-2i/D).

    In float32 at least, whatever the model's dtype.
    """
    S, D, dtype = x.shape[1], x.shape[3], x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    frequency = 10000.0 ** (-torch.arange(0, D, 2, dtype=wide) / D)
    angle = (torch.arange(S, dtype=wide) + first_position)[:, None, None] * frequency
    if fault == "cast_angles":
        angle = angle.to(dtype).to(wide)
    x, half_split = x.to(wide), fault == "half_split"
    first, second = x.chunk(2, -1) if half_split else (x[..., 0::2], x[..., 1::2])
    pair = (
        first * angle.cos() - second * angle.sin(),
        first * angle.sin() + second * angle.cos(),
    )
    turned = torch.cat(pair, -1) if half_split else torch.stack(pair, -1).flatten(-2)
    return turned.to(dtype)


def forward(
    weights: dict[str, Tensor],
    shape: Shape,
    ids: Tensor,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    fault: str | None = None,
    first_position: int = 0,
) -> dict[str, Any]:
    """All that NeoBERT gives for ``ids`` of ``[B, S]``, under the names of transformers' outputs.

    Of the heads what the weights have: "logits" of the LM head, "classes" and "answer" of every
    token. "cast_angles" is one more fault, which shows in bfloat16 only.
    """
    assert fault in (None, "cast_angles", *FAULTS)
    w = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in weights.items()}
    eps = 1e-6 if fault == "eps" else 1e-5
    H, D = shape.heads, shape.width // shape.heads
    x = w["encoder.weight"][ids]
    hidden_states, attentions = [x], []
    for i in range(shape.layers):
        layer = f"transformer_encoder.{i}."
        u = _rms_norm(x, w[layer + "attention_norm.weight"], eps) @ w[layer + "qkv.weight"].T
        if fault == "plain_thirds":
            q, k, v = (t.unflatten(-1, (H, D)) for t in u.chunk(3, -1))
        else:
            u = u.unflatten(-1, (H, 3 * D))
            q, k, v = u[..., :D], u[..., D : 2 * D], u[..., 2 * D :]
        q, k = (_rotate(t, first_position, fault) for t in (q, k))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / D**0.5
        if mask is not None and fault != "no_mask":
            scores = scores.masked_fill(~mask.bool()[:, None, None, :], float("-inf"))
        attentions.append(scores.softmax(-1))
        attended = torch.einsum("bhij,bjhd->bihd", attentions[-1], v).flatten(-2)
        x = x + attended @ w[layer + "wo.weight"].T
        first, second = (
            _rms_norm(x, w[layer + "ffn_norm.weight"], eps) @ w[layer + "ffn.w12.weight"].T
        ).chunk(2, -1)
        gate, value = (second, first) if fault == "value_first" else (first, second)
        x = x + (gate * gate.sigmoid() * value) @ w[layer + "ffn.w3.weight"].T
        hidden_states.append(x)
    if fault != "no_final_norm":
        x = _rms_norm(x, w["layer_norm.weight"], eps)
    hidden_states[-1] = x
    out: dict[str, Any] = {"hidden_states": hidden_states, "attentions": attentions}
    out["last_hidden_state"] = x
    if "decoder.weight" in w:
        decoder = w["encoder.weight" if fault == "tied_decoder" else "decoder.weight"]
        out["logits"] = x @ decoder.T + (0 if fault == "no_decoder_bias" else w["decoder.bias"])
    if "dense.weight" in w:
        dense = (x @ w["dense.weight"].T + w["dense.bias"]).tanh()
        out["classes"] = dense @ w["classifier.weight"].T + w["classifier.bias"]
    if "qa_outputs.weight" in w:
        out["answer"] = x @ w["qa_outputs.weight"].T + w["qa_outputs.bias"]
    return out
