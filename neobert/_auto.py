"""Makes the ``Auto`` classes of transformers know NeoBERT, without importing transformers for it.

Loading transformers takes seconds, the ``neobert`` command must answer at once, and
``neobert doctor`` must run where transformers is missing. So registration waits for transformers.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register() -> None:
    """Enter our classes; those that are entered come before code that a repository offers."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )

    from neobert import heads
    from neobert.config import NeoBERTConfig
    from neobert.model import NeoBERTModel
    from neobert.tokenization import NeoBERTTokenizer

    AutoConfig.register(NeoBERTConfig.model_type, NeoBERTConfig, exist_ok=True)
    AutoTokenizer.register(NeoBERTConfig, NeoBERTTokenizer, exist_ok=True)
    for auto, model in (
        (AutoModel, NeoBERTModel),
        (AutoModelForMaskedLM, heads.NeoBERTForMaskedLM),
        (AutoModelForSequenceClassification, heads.NeoBERTForSequenceClassification),
        (AutoModelForTokenClassification, heads.NeoBERTForTokenClassification),
        (AutoModelForQuestionAnswering, heads.NeoBERTForQuestionAnswering),
    ):
        auto.register(NeoBERTConfig, model, exist_ok=True)


def register_with_transformers() -> None:
    """`register` now if transformers is loaded, or else right after it is."""
    if "transformers" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterTransformers())


class _AfterTransformers(importlib.abc.MetaPathFinder):
    """Watches for the end of the import of transformers.

    One of our own modules may be what imports it; that module is incomplete then, and `register`
    would need it. So ours are watched too, and `register` waits for the outermost.
    """

    def __init__(self) -> None:
        self._depth = 0

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "transformers" and not name.startswith("neobert."):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    vars(spec.loader)["exec_module"] = partial(self._execute, spec.loader)
                return spec
        return None

    def _execute(self, loader: Any, module: ModuleType) -> None:
        del vars(loader)["exec_module"]
        self._depth += 1
        try:
            loader.exec_module(module)
        finally:
            self._depth -= 1
        if not self._depth and "transformers" in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register()
