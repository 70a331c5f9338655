"""NeoBERT for transformers 5. Importing this makes the ``Auto`` classes of transformers know it.

A class registered here comes before code that a model repository offers, so
``AutoModel.from_pretrained("chandar-lab/NeoBERT")`` builds `NeoBERTModel` and runs no remote code.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from neobert.config import NeoBERTConfig
from neobert.heads import (
    NeoBERTForMaskedLM,
    NeoBERTForQuestionAnswering,
    NeoBERTForSequenceClassification,
    NeoBERTForTokenClassification,
)
from neobert.model import NeoBERTModel
from neobert.tokenization import NeoBERTTokenizer

__all__ = [
    "NeoBERTConfig",
    "NeoBERTForMaskedLM",
    "NeoBERTForQuestionAnswering",
    "NeoBERTForSequenceClassification",
    "NeoBERTForTokenClassification",
    "NeoBERTModel",
    "NeoBERTTokenizer",
]

AutoConfig.register(NeoBERTConfig.model_type, NeoBERTConfig, exist_ok=True)
AutoTokenizer.register(NeoBERTConfig, NeoBERTTokenizer, exist_ok=True)
AutoModel.register(NeoBERTConfig, NeoBERTModel, exist_ok=True)
AutoModelForMaskedLM.register(NeoBERTConfig, NeoBERTForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    NeoBERTConfig, NeoBERTForSequenceClassification, exist_ok=True
)
AutoModelForTokenClassification.register(
    NeoBERTConfig, NeoBERTForTokenClassification, exist_ok=True
)
AutoModelForQuestionAnswering.register(NeoBERTConfig, NeoBERTForQuestionAnswering, exist_ok=True)
