"""BERT: learned positions, post-norm, full attention, GELU.

Class names are those of transformers' ``modeling_bert``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import neobert_kernels as nk
from neobert_kernels import _check
from neobert_kernels.patching import Replacement, expect, replacement
from neobert_kernels.patching.batch import (
    Batch,
    read_batch,
    refuse_attention_dropout,
    refuse_attentions,
    setting,
)

OPERATORS = ("add_layer_norm", "attention", "first_pool", "layer_norm")


def check(base: Any) -> None:
    """Raise ValueError unless every part is one that the forwards below understand."""
    from transformers.models.bert import modeling_bert as bert

    if base.config.is_decoder or base.config.add_cross_attention:
        raise _check.error("model", "an encoder (is_decoder=False)", "a BERT decoder")
    expect(base.embeddings, bert.BertEmbeddings, "embeddings")
    expect(base.embeddings.LayerNorm, nn.LayerNorm, "embeddings.LayerNorm")
    for i, layer in enumerate(base.encoder.layer):
        name = f"encoder.layer.{i}"
        expect(layer, bert.BertLayer, name)
        expect(layer.attention.self, bert.BertSelfAttention, f"{name}.attention.self")
        for part in (layer.attention.output, layer.output):
            expect(part.LayerNorm, nn.LayerNorm, f"{name} LayerNorm")


def replacements(name: str, base: Any) -> Iterator[Replacement]:
    yield Replacement(name, base, model_forward, "packs once, unpacks once")
    prefix = f"{name}." if name else ""
    for i, layer in enumerate(base.encoder.layer):
        what = "packed attention, norms fused with their residual"
        yield Replacement(f"{prefix}encoder.layer.{i}", layer, layer_forward, what)


def _embed(embeddings: Any, batch: Batch, ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
    """Word, position and token-type vectors summed and normalized, ``[T, C]``."""
    x = batch.pack(ids)
    if not x.is_floating_point():
        x = embeddings.word_embeddings(x)
    if token_type_ids is None:
        types = torch.zeros_like(batch.positions)
    else:
        _check.shape("token_type_ids", token_type_ids, ids.shape[:2])
        types = batch.pack(token_type_ids)
    x = x + embeddings.token_type_embeddings(types)
    norm = embeddings.LayerNorm
    positions = embeddings.position_embeddings(batch.positions)
    y, _ = nk.add_layer_norm(x, positions, norm.weight, norm.bias, norm.eps)
    return embeddings.dropout(y)


@replacement
def layer_forward(self: Any, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """One block on packed tokens, ``[T, C]`` to ``[T, C]``."""
    attention = self.attention.self
    refuse_attention_dropout(self.training, attention.dropout.p)
    q, k, v = (
        project(x).unflatten(-1, (-1, attention.attention_head_size))
        for project in (attention.query, attention.key, attention.value)
    )
    context = nk.attention(q, k, v, cu_seqlens, max_seqlen, scale=attention.scaling).flatten(1)
    x = _residual_norm(self.attention.output, context, x)
    return _residual_norm(self.output, self.intermediate(x), x)


def _residual_norm(block: Any, x: Tensor, residual: Tensor) -> Tensor:
    norm = block.LayerNorm
    x = block.dropout(block.dense(x))
    return nk.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)[0]


@replacement
def model_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """``BertModel.forward`` on real tokens only; also takes packed input (see `read_batch`)."""
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise _check.error("input_ids", "either input_ids or inputs_embeds", got)
    for name in ("encoder_hidden_states", "past_key_values"):
        if kwargs.get(name) is not None:
            raise _check.error(name, "None in a patched encoder", type(kwargs[name]).__name__)
    refuse_attentions(kwargs, self.config)
    tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
    _check.tensor("input_ids", tokens, ndim=2 if inputs_embeds is None else 3)
    keep_all = setting(kwargs, "output_hidden_states", self.config)
    return_dict = kwargs.get("return_dict")
    longest = self.config.max_position_embeddings
    batch = read_batch(tokens, attention_mask, position_ids, kwargs, longest)

    x = _embed(self.embeddings, batch, tokens, token_type_ids)
    states = [x]
    for layer in self.encoder.layer:
        x = layer(x, batch.cu_seqlens, batch.max_seqlen)
        if keep_all:
            states.append(x)
    pooled = None
    if self.pooler is not None:
        pooled = self.pooler(nk.first_pool(x, batch.cu_seqlens)[:, None])
    output = BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=batch.unpack(x),
        pooler_output=pooled,
        hidden_states=tuple(map(batch.unpack, states)) if keep_all else None,
    )
    use_dict = self.config.return_dict if return_dict is None else return_dict
    return output if use_dict else output.to_tuple()
