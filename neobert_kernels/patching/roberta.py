"""RoBERTa: BERT's blocks, with positions counted from ``padding_idx + 1`` over non-padding ids."""

import importlib
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from neobert_kernels._packed import document_of_token
from neobert_kernels.patching import bert, heads
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.blocks import expect
from neobert_kernels.patching.family import Family, Packed


def first_position(base: Any) -> int:
    return base.embeddings.padding_idx + 1


def positions(base: Any, input_ids: Tensor, batch: Batch) -> Tensor:
    """As the unpatched model counts: padding ids, wherever they stand, do not count."""
    padding = base.embeddings.padding_idx
    if batch.packing is not None:
        counts = (input_ids != padding).int()
        return batch.pack((counts.cumsum(1) * counts).long() + padding)
    counts = (input_ids[0] != padding).int()
    sums = F.pad(counts.cumsum(0), (1, 0))
    before = sums[batch.cu_seqlens[:-1].long()]
    own = sums[1:] - before[document_of_token(batch.cu_seqlens, len(counts))]
    return (own * counts).long() + padding


def longest(base: Any) -> int:
    return base.config.max_position_embeddings - first_position(base)


def hidden(self: Any, x: Tensor) -> Tensor:
    """What ``lm_head`` feeds its decoder."""
    head = self.lm_head
    return head.layer_norm(F.gelu(head.dense(x)))


def classify(self: Any, packed: Packed) -> Tensor:
    return self.classifier(heads.first_pooled(packed)[:, None])


def check_head(head: Any, module: str, prefix: str) -> None:
    if hasattr(head, "lm_head"):
        modeling = importlib.import_module(module)
        expect(head.lm_head, getattr(modeling, f"{prefix}LMHead"), "lm_head")


def family(name: str, prefix: str) -> Family:
    """RoBERTa, or a family whose classes are the same under another ``prefix``."""
    module = f"transformers.models.{name}.modeling_{name}"
    return Family(
        name=name,
        operators=bert.OPERATORS,
        check=lambda base: bert.check_like_bert(base, module, prefix),
        layers=bert.layers,
        layer_forward=bert.layer_forward,
        view=bert.view,
        stack=bert.stack,
        what=bert.FAMILY.what,
        embed=bert.embed,
        run=bert.run,
        output=bert.FAMILY.output,
        longest=longest,
        extras=bert.FAMILY.extras,
        pool=bert.pool,
        first_position=first_position,
        positions=positions,
        check_head=lambda head: check_head(head, module, prefix),
        heads={
            f"{prefix}ForMaskedLM": heads.masked_lm(hidden, lambda self: self.lm_head.decoder),
            f"{prefix}ForSequenceClassification": heads.sequence_classification(classify),
            f"{prefix}ForMultipleChoice": heads.multiple_choice(bert.classify_pooled),
            f"{prefix}ForTokenClassification": heads.token_classification(bert.dropped_classifier),
            f"{prefix}ForQuestionAnswering": heads.question_answering(
                lambda self, x: self.qa_outputs(x)
            ),
        },
    )


FAMILY = family("roberta", "Roberta")
