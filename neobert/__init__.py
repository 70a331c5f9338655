"""NeoBERT for transformers 5. Importing this makes the ``Auto`` classes of transformers know it.

A class registered here comes before code that a model repository offers, so
``AutoModel.from_pretrained("chandar-lab/NeoBERT")`` builds `NeoBERTModel` and runs no remote code.
"""

import importlib
from typing import TYPE_CHECKING, Any

from neobert import _auto

if TYPE_CHECKING:
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

_MODULE_OF = dict.fromkeys(__all__, "heads") | {
    "NeoBERTConfig": "config",
    "NeoBERTModel": "model",
    "NeoBERTTokenizer": "tokenization",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'neobert' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"neobert.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_auto.register_with_transformers()
