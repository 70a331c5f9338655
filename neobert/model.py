"""NeoBERT, native to transformers 5: a pre-norm encoder with SwiGLU and rotary positions.

    x = E[ids]
    per layer:  x = x + W_o attention(rope(q), rope(k), v),  q, k, v = W_qkv rms_norm(x), per head
                x = x + W_3 (silu(g) * b),                   g, b = W_12 rms_norm(x)
    y = rms_norm(x)

Module and tensor names are those of the published checkpoint (chandar-lab/NeoBERT), so it loads and
saves unchanged. The rotary angles are computed from the positions in float32 in every forward and
live in no buffer: no cast and no meta device can reach them.

Source: Le Breton, Fournier, El Mezouar and Chandar 2025, arXiv:2502.19587, section 3.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_bidirectional_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

import neobert_kernels as nk
from neobert import checkpoint
from neobert.config import NeoBERTConfig
from neobert_kernels import _check
from neobert_kernels._packed import restarting_positions
from neobert_kernels.patching.batch import given_boundaries


class Documents(NamedTuple):
    """A packed row: document i is tokens ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]``."""

    cu_seqlens: Tensor
    max_seqlen: int
    names: tuple[str, str] = ("cu_seqlens", "max_seqlen")  # as the caller has them, for errors


def documents_of(kwargs: dict[str, Any]) -> Documents | None:
    """The packed layout among ``forward``'s keywords, under Hugging Face's names or upstream's."""
    found, names = given_boundaries(dict(kwargs))
    return None if found is None else Documents(*found, names)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """From ``[B, H, S, D]`` the output ``[B, S, H, D]`` and the weights ``[B, H, S, S]``."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
        query.dtype
    )
    return (weights @ value).transpose(1, 2), weights


class NeoBERTRMSNorm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class NeoBERTFeedForward(nn.Module):
    """SwiGLU: ``w12`` holds the gate's rows, then the value's."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.hidden_size, 2 * config.feed_forward_size, bias=False)
        self.w3 = nn.Linear(config.feed_forward_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class NeoBERTLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind its norm and inside a residual connection."""

    is_causal = False

    def __init__(self, config: NeoBERTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.attention_norm = NeoBERTRMSNorm(config.hidden_size, config.norm_eps)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.ffn_norm = NeoBERTRMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = NeoBERTFeedForward(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        documents: Documents | None = None,
        attn_implementation: str = "sdpa",
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, S, C]`` (packed: ``[1, T, C]``) and the attention weights, where they are computed.

        ``rotary`` is cos and sin, one row per token of the flattened batch.
        """
        qkv = self.qkv(self.attention_norm(hidden_states))
        # A head's rows of the projection are its q, its k and its v.
        qkv = qkv.view(*qkv.shape[:2], self.heads, 3, self.head_size)
        weights = None
        if documents is None:
            attended, weights = self._attend(qkv, attention_mask, rotary, attn_implementation)
        else:
            cos, sin = rotary
            attended = nk.qkv_attention(qkv[0], *documents[:2], cos=cos, sin=sin, interleaved=True)
        hidden_states = hidden_states + self.wo(attended.reshape(hidden_states.shape))
        return hidden_states + self.ffn(self.ffn_norm(hidden_states)), weights

    def _attend(
        self,
        qkv: Tensor,
        attention_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        attn_implementation: str,
    ) -> tuple[Tensor, Tensor | None]:
        batch = qkv.shape[:2]
        query, key, value = qkv.unbind(-2)
        query, key = (
            nk.rope_reference(x.flatten(0, 1), *rotary, interleaved=True).unflatten(0, batch)
            for x in (query, key)
        )
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(attn_implementation, eager_attention)
        return attention(
            self,
            *(x.transpose(1, 2) for x in (query, key, value)),
            attention_mask,
            dropout=0.0,
            scaling=self.head_size**-0.5,
        )


class NeoBERTPreTrainedModel(PreTrainedModel):
    """What the base model and every head share: initialization, loading and declared abilities."""

    config_class = NeoBERTConfig
    config: NeoBERTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "encoder"
    _no_split_modules = ["NeoBERTLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": NeoBERTLayer,
        "attentions": NeoBERTLayer,
    }
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^(decoder|dense|classifier|qa_outputs)\."  # the heads of other tasks
    ]

    @property
    def _linear_init_range(self) -> float:
        return self.config.decoder_init_range

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.uniform_(module.weight, -self._linear_init_range, self._linear_init_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.uniform_(
                module.weight, -self.config.embedding_init_range, self.config.embedding_init_range
            )
        elif isinstance(module, NeoBERTRMSNorm):
            init.ones_(module.weight)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a local folder or a hub id, as `PreTrainedModel.from_pretrained` does.

        A head that the checkpoint lacks altogether is initialized. Any other missing tensor, and a
        misshapen one unless ``ignore_mismatched_sizes``, is an error instead of random weights.

        Raises:
            ValueError: A tensor is missing or misshapen; the message names it.
            OSError: A file is missing, unreadable or cut short.
        """
        with checkpoint.readable(pretrained_model_name_or_path):
            load: Any = super().from_pretrained
            model, info = load(
                pretrained_model_name_or_path,
                *args,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        checkpoint.check_loaded(
            model, info, pretrained_model_name_or_path, any_shape=ignore_mismatched_sizes
        )
        return (model, info) if output_loading_info else model


class NeoBERTModel(NeoBERTPreTrainedModel):
    """The encoder, without a head. The token embedding is called ``encoder``, as published."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        self.encoder = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.transformer_encoder = nn.ModuleList(
            NeoBERTLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.layer_norm = NeoBERTRMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encode a padded batch, or documents packed end to end.

        Args:
            input_ids: ``[B, S]`` token ids; packed ``[1, T]``.
            attention_mask: ``[B, S]``, non-zero where there is a token, of any dtype; padding may
                be on either side. None: no padding. Only keys are masked. A row without any token
                is computed as if it had no padding.
            position_ids: ``[B, S]`` or ``[1, S]``; default 0, 1, 2, ... from the start of the row,
                or when packed of each document.
            inputs_embeds: ``[B, S, C]`` instead of ``input_ids``.
            **kwargs: For packed input ``cu_seq_lens_q`` (int32 ``[B + 1]``, from 0 to T) and
                ``max_length_q``, or upstream's names ``cu_seqlens`` and ``max_seqlen``.
                ``output_hidden_states``: also return N + 1 tensors ``[B, S, C]``: the embeddings,
                the outputs of the first N - 1 layers, and last the final norm's output.
                ``output_attentions``: also return the N weights ``[B, H, S, S]``; computed by the
                eager implementation, whatever the model otherwise uses. ``return_dict``. Anything
                else, such as ``token_type_ids``, has no effect.

        Returns:
            `BaseModelOutput` with ``last_hidden_state`` of ``[B, S, C]``.

        Raises:
            ValueError: A shape breaks the rules above, a document is longer than
                ``config.max_length``, packed input comes with a mask or wants
                attentions, or there is a cache.
        """
        if kwargs.get("past_key_values") is not None:
            raise _check.error("past_key_values", "None (an encoder has no cache)", "a cache")
        hidden_states = self._embed(input_ids, inputs_embeds)
        output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        documents = documents_of(kwargs)
        if documents is not None:
            self._check_packed(documents, hidden_states, attention_mask, output_attentions)
        length = hidden_states.shape[1] if documents is None else documents.max_seqlen
        if length > self.config.max_length:
            rule = f"at most {self.config.max_length} tokens (max_length)"
            raise _check.error("input_ids", rule, length)

        implementation = "eager" if output_attentions else self.config._attn_implementation
        mask = self._mask(attention_mask, hidden_states, implementation)
        rotary = self._rotary(position_ids, hidden_states, documents)
        for layer in self.transformer_encoder:
            hidden_states, _ = layer(
                hidden_states,
                attention_mask=mask,
                rotary=rotary,
                documents=documents,
                attn_implementation=implementation,
            )
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if input_ids is not None and inputs_embeds is None:
            _check.tensor("input_ids", input_ids, ndim=2)
            return self.encoder(input_ids)
        if inputs_embeds is None or input_ids is not None:
            got = "neither" if input_ids is None else "both"
            raise _check.error("input_ids", "either input_ids or inputs_embeds", got)
        _check.tensor("inputs_embeds", inputs_embeds, ndim=3)
        width = self.config.hidden_size
        _check.shape("inputs_embeds", inputs_embeds, (*inputs_embeds.shape[:2], width))
        return inputs_embeds

    @staticmethod
    def _check_packed(
        documents: Documents,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        output_attentions: bool,
    ) -> None:
        if len(hidden_states) != 1:
            raise _check.error("input_ids", "one row when packed", f"{len(hidden_states)} rows")
        if attention_mask is not None:
            raise _check.error("attention_mask", "None when packed", tuple(attention_mask.shape))
        if output_attentions:
            raise _check.error("output_attentions", "False when packed", output_attentions)
        tokens, device = hidden_states.shape[1], hidden_states.device
        _check.documents(
            documents.cu_seqlens, documents.max_seqlen, tokens, device, documents.names
        )

    def _mask(
        self, attention_mask: Tensor | None, hidden_states: Tensor, implementation: str
    ) -> Any:
        """The padding as ``implementation`` takes it: where it can, one row and not S by S."""
        if attention_mask is None:
            return None
        _check.shape("attention_mask", attention_mask, hidden_states.shape[:2])
        mask = attention_mask.to(hidden_states.device, torch.bool)
        # Softmax over no key has no answer; nobody reads such a row, but it must be finite.
        mask = mask | ~mask.any(-1, keepdim=True)
        if implementation not in ("sdpa", "eager"):
            if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:  # padding would be attended to
                rule = "an implementation with a registered mask function"
                raise _check.error("attn_implementation", rule, implementation)
            return create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=mask
            )
        # No mask lets SDPA choose its flash kernel.
        if not (is_tracing(mask) or mask.is_meta) and mask.all():
            return None
        return mask[:, None, None, :]

    def _rotary(
        self, position_ids: Tensor | None, hidden_states: Tensor, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin in float32, each ``[B * S, D / 2]``."""
        B, S, _ = hidden_states.shape
        if position_ids is not None:
            _check.tensor("position_ids", position_ids, ndim=2)
            _check.shape("position_ids", position_ids, (1 if len(position_ids) == 1 else B, S))
        elif documents is not None:
            position_ids = restarting_positions(documents.cu_seqlens, S)[None]
        else:
            position_ids = torch.arange(S, device=hidden_states.device)[None]
        head_size = self.config.hidden_size // self.config.num_attention_heads
        cos, sin = nk.rope_table(position_ids.flatten(), head_size, self.config.rope_theta)
        if position_ids.shape[0] != B:
            cos, sin = cos.repeat(B, 1), sin.repeat(B, 1)
        return cos, sin
