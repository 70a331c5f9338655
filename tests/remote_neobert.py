"""What a user has after loading NeoBERT as remote code, written for the tests from its description.

Loaded under a module name that begins with ``transformers_modules.``, because that is how `patch`
knows such classes. Names, structure, signature and ``hidden_states`` are the published ones; the
mathematics is plain PyTorch, in float64 when the model is. Nothing here comes from the hub.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
)


class NeoBERTConfig(PretrainedConfig):
    model_type = "neobert_stand_in"

    def __init__(
        self,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        vocab_size=97,
        max_length=64,
        norm_eps=1e-5,
        pad_token_id=0,
        classifier_dropout=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.dim_head = hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.norm_eps = norm_eps
        self.pad_token_id = pad_token_id
        self.classifier_dropout = classifier_dropout


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * inner, bias=False)
        self.w3 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).tensor_split(2, dim=-1)
        return self.w3(value * gate * gate.sigmoid())


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """``x [B, S, H, D]``, neighbouring channels as a complex number, by ``turns [B, S, D/2]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * turns.to(pairs.dtype)[:, :, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class EncoderBlock(nn.Module):
    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.ffn = SwiGLU(width, (2 * config.intermediate_size // 3 + 7) // 8 * 8)
        self.attention_norm = nn.RMSNorm(width, config.norm_eps)
        self.ffn_norm = nn.RMSNorm(width, config.norm_eps)

    def forward(self, x: Tensor, allowed: Tensor | None, turns: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (self.heads, -1))
        q, k, v = qkv.chunk(3, -1)
        q, k = rotated(q, turns), rotated(k, turns)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + self.wo(attended.transpose(1, 2).flatten(2))
        return x + self.ffn(self.ffn_norm(x))


class NeoBERTPreTrainedModel(PreTrainedModel):
    config_class = NeoBERTConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        pass


class NeoBERT(NeoBERTPreTrainedModel):
    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        self.encoder = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.transformer_encoder = nn.ModuleList(
            [EncoderBlock(config) for _ in range(config.num_hidden_layers)]
        )
        self.layer_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        frequency = 10000.0 ** (-torch.arange(0, config.dim_head, 2).double() / config.dim_head)
        angles = torch.outer(torch.arange(config.max_length).double(), frequency)
        turns = torch.polar(torch.ones_like(angles), angles)
        self.register_buffer("freqs_cis", turns, persistent=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        position_ids=None,
        max_seqlen=None,
        cu_seqlens=None,
        attention_mask=None,
        inputs_embeds=None,
        output_hidden_states=False,
        output_attentions=False,
        **kwargs,
    ):
        x = self.encoder(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.shape[1]
        turns = self.freqs_cis[:length] if position_ids is None else self.freqs_cis[position_ids]
        turns = turns.expand(len(x), *turns.shape[-2:])
        allowed = None
        if cu_seqlens is not None:
            document = torch.bucketize(torch.arange(length), cu_seqlens[1:], right=True)
            allowed = document[:, None] == document
        elif attention_mask is not None:
            allowed = attention_mask.bool()[:, None, None, :]
        states = []
        for layer in self.transformer_encoder:
            x = layer(x, allowed, turns)
            states.append(x)
        return BaseModelOutput(
            last_hidden_state=self.layer_norm(x),
            hidden_states=tuple(states) if output_hidden_states else None,
        )


class NeoBERTLMHead(NeoBERTPreTrainedModel):
    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        self.model = NeoBERT(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        position_ids=None,
        max_seqlen=None,
        cu_seqlens=None,
        attention_mask=None,
        output_hidden_states=False,
        output_attentions=False,
        **kwargs,
    ):
        out = self.model.forward(
            input_ids=input_ids,
            position_ids=position_ids,
            max_seqlen=max_seqlen,
            cu_seqlens=cu_seqlens,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
        )
        logits = self.decoder(out.last_hidden_state)
        return MaskedLMOutput(logits=logits, hidden_states=out.hidden_states)


class NeoBERTForSequenceClassification(NeoBERTPreTrainedModel):
    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        self.model = NeoBERT(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        position_ids=None,
        max_seqlen=None,
        cu_seqlens=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        output_hidden_states=False,
        output_attentions=False,
        return_dict=None,
    ):
        out = self.model(
            input_ids, position_ids, max_seqlen, cu_seqlens, attention_mask, inputs_embeds
        )
        x = self.dropout(out.last_hidden_state[:, 0])
        logits = self.classifier(self.dropout(self.dense(x).tanh()))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
