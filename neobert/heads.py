"""NeoBERT with a head: masked LM, sequence and token classification, question answering.

Logits come in the model's dtype, losses are computed in float32. ``num_items_in_batch``, which
transformers' Trainer passes, replaces the count a loss is divided by, so that accumulated gradients
equal those of one large batch. A batch without any label that counts has loss 0.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import (
    MaskedLMOutput,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

import neobert_kernels as nk
from neobert.config import NeoBERTConfig
from neobert.model import NeoBERTModel, NeoBERTPreTrainedModel, documents_of
from neobert_kernels import _check

IGNORE_INDEX = -100


def wide(logits: Tensor) -> Tensor:
    """16-bit logits in float32; wider ones as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    items: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Mean over the labels that are not ``ignore_index``, or the sum over ``items``, in float32."""
    labels = labels.to(logits.device).flatten()
    _check.within("labels", labels, logits.shape[-1], ignore_index)
    total = F.cross_entropy(
        wide(logits).flatten(0, -2), labels, ignore_index=ignore_index, reduction="sum"
    )
    if items is None:
        items = (labels != ignore_index).sum().clamp(min=1)
    return total / torch.as_tensor(items, device=total.device)


class NeoBERTForMaskedLM(NeoBERTPreTrainedModel):
    """The encoder and an untied linear decoder with bias."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        self.model = NeoBERTModel(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """As `NeoBERTModel.forward`, and ``labels`` of ``[B, S]`` with -100 where there is none.

        Returns:
            ``logits`` of ``[B, S, V]``; ``loss``, the mean cross-entropy over the labelled tokens.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, **kwargs, return_dict=True
        )
        logits = self.decoder(outputs.last_hidden_state)
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return _output(MaskedLMOutput, outputs, loss=loss, logits=logits)


class _Classifier(NeoBERTPreTrainedModel):
    """dropout -> dense -> tanh -> dropout -> classifier, over any tokens."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None  # PreTrainedConfig sets two labels if none are given
        self.num_labels = config.num_labels
        self.model = NeoBERTModel(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @property
    def _linear_init_range(self) -> float:
        return self.config.classifier_init_range

    def _classify(self, tokens: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.dense(self.dropout(tokens)).tanh()))


class NeoBERTForSequenceClassification(_Classifier):
    """One prediction per document, from its first token."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """As `NeoBERTModel.forward`, and ``labels`` of one kind per ``config.problem_type``.

        ``regression``: float ``[B]`` or ``[B, num_labels]``, mean squared error.
        ``single_label_classification``: int ``[B]``, cross-entropy.
        ``multi_label_classification``: float ``[B, num_labels]``, binary cross-entropy.
        Unset, it follows from ``num_labels`` and the labels' dtype, and is kept in the config.

        Returns:
            ``logits`` of ``[B, num_labels]``, for packed input one row per document; ``loss``.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, **kwargs, return_dict=True
        )
        hidden_states, documents = outputs.last_hidden_state, documents_of(kwargs)
        if documents is not None:
            first = nk.first_pool(hidden_states[0], documents.cu_seqlens)
        elif attention_mask is None:
            first = hidden_states[:, 0]
        else:
            position = attention_mask.to(hidden_states.device).bool().int().argmax(-1)
            first = hidden_states[torch.arange(len(position), device=position.device), position]
        logits = self._classify(first)
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        return _output(SequenceClassifierOutput, outputs, loss=loss, logits=logits)

    def _loss(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.is_floating_point():
                self.config.problem_type = "multi_label_classification"
            else:
                self.config.problem_type = "single_label_classification"
        if self.config.problem_type == "single_label_classification":
            return cross_entropy(logits, labels, items)
        if labels.numel() != logits.numel():
            raise _check.error("labels", f"{logits.numel()} values", labels.numel())
        logits = wide(logits)
        labels = labels.to(logits).reshape(logits.shape)
        if self.config.problem_type == "regression":
            total = F.mse_loss(logits, labels, reduction="sum")
        else:
            total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return total / (max(labels.numel(), 1) if items is None else items)


class NeoBERTForTokenClassification(_Classifier):
    """One prediction per token."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """As `NeoBERTModel.forward`, and ``labels`` of ``[B, S]`` with -100 where there is none.

        Returns:
            ``logits`` of ``[B, S, num_labels]``; ``loss``, the mean over the labelled tokens.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, **kwargs, return_dict=True
        )
        logits = self._classify(outputs.last_hidden_state)
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return _output(TokenClassifierOutput, outputs, loss=loss, logits=logits)


class NeoBERTForQuestionAnswering(NeoBERTPreTrainedModel):
    """The first and the last token of the answer in each row."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        self.model = NeoBERTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @property
    def _linear_init_range(self) -> float:
        return self.config.classifier_init_range

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """As `NeoBERTModel.forward`, and ``start_positions`` and ``end_positions``, int ``[B]``.

        A position outside the row is not counted.

        Returns:
            ``start_logits`` and ``end_logits`` of ``[B, S]``; ``loss``, the mean of the two
            cross-entropies.

        Raises:
            ValueError: Positions with packed input, where a row is not a document.
        """
        answered = start_positions is not None and end_positions is not None
        if answered and documents_of(kwargs) is not None:
            raise _check.error("start_positions", "None when packed", start_positions)
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, **kwargs, return_dict=True
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            outside = start_logits.shape[1]
            loss = sum(
                cross_entropy(logits, positions.clamp(0, outside), ignore_index=outside) / 2
                for logits, positions in (
                    (start_logits, start_positions),
                    (end_logits, end_positions),
                )
            )
        return _output(
            QuestionAnsweringModelOutput,
            outputs,
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
        )


def _output(kind: type[ModelOutput], outputs: Any, **fields: Any) -> Any:
    return kind(**fields, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
