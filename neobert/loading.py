"""A model folder or hub id as a model and a tokenizer: safetensors only, never remote code.

Whatever is missing or damaged is one error that names it.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from neobert.sentence_files import SentenceSettings
from neobert_kernels import patching

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors", "*/config.json"]
_TOKENIZER_FILES = ["*.json", "*.txt", "*.model"]


def model_folder(model: str | os.PathLike[str], revision: str | None) -> Path:
    """The local folder of a model, downloading a hub id's files (and no pickle) if needed."""
    path = _folder(model, revision, _HUB_FILES, "model")
    if not (path / "config.json").is_file():
        raise OSError(f"model: expected a folder with config.json, got {model}")
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        found = ", ".join(sorted(p.name for p in path.glob("*.bin"))) or "none"
        raise OSError(f"model: expected safetensors weights in {model}, got {found}")
    return path


def model_name(model: str, name: str | None = None) -> str:
    """What reports call a model: as given, else a hub id as it is or a folder's last name.

    Raises:
        ValueError: No folder can have this name.
    """
    path = Path(model)
    name = name if name is not None else (path.resolve().name if path.is_dir() else model)
    if not name.strip() or name.startswith(".") or "\\" in name:
        raise ValueError(f"name: expected a name that a folder can have, got {name!r}")
    return name


def tokenizer_folder(name: str, revision: str | None = None) -> Path:
    """The local folder of a tokenizer, downloading a hub id's files (and no weights) if needed."""
    return _folder(name, revision, _TOKENIZER_FILES, "tokenizer")


def _folder(
    name: str | os.PathLike[str], revision: str | None, wanted: list[str], argument: str
) -> Path:
    path = Path(name)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision: expected none for a local folder, got {revision!r}")
        return path
    if path.exists() or path.is_absolute() or str(name).startswith((".", "~")):
        got = "a file" if path.exists() else "nothing"
        raise OSError(f"{argument}: expected a folder or a hub id, got {got} at {path}")
    return _download(str(name), revision, wanted, argument)


def _download(name: str, revision: str | None, wanted: list[str], argument: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except HFValidationError:
        reason = "not the form of a hub id"
    except LocalEntryNotFoundError:
        known = ", ".join(_cached_models()[:10])
        reason = (
            "the hub cannot be reached and its files are not in the local cache"
            f"{f', which has {known}' * bool(known)}; "
            "neobert encode --help names an installed model"
        )
    except HfHubHTTPError as error:
        reason = str(error).splitlines()[0]
    except OSError as error:
        reason = str(error).splitlines()[0]
    raise OSError(f"{argument}: expected a folder or a hub id, got {name!r} ({reason})")


def _cached_models() -> list[str]:
    """Hub ids in the local cache, by name."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError, ValueError):
        return []
    return sorted(each.repo_id for each in repositories if each.repo_type == "model")


def model_family(folder: Path, patched: bool) -> str:
    try:
        family = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"config.json: expected a JSON object, got {error}") from None
    if isinstance(family, str):
        family = family.replace("-", "_")  # "xlm-roberta", of the package xlm_roberta
    supported = patching.supported_families()
    if patched and family not in supported:
        raise ValueError(
            f"model: expected a supported family ({', '.join(supported)}), got {family!r}; "
            "unpatched it still works where transformers knows it"
        )
    return str(family)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bar per tensor and no load report: what is wrong with a checkpoint becomes an error."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModel

    import neobert  # noqa: F401  (registers NeoBERT)
    from neobert import checkpoint

    with quiet_loading(), checkpoint.readable(folder):
        model, info = AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_without_pooler(folder),
        )
    checkpoint.check_loaded(model, info, folder)
    return model


def load_tokenizer(folder: Path, vocabulary: int | None, argument: str = "model") -> Any:
    """The fast tokenizer in a folder; ``argument`` is what errors call the caller's choice."""
    from transformers import AutoTokenizer

    # Without any of them transformers builds a tokenizer that knows no word.
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        names = ", ".join(_VOCABULARIES)
        raise OSError(f"{argument}: expected one of {names} in {folder}, got none")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"{argument}: expected tokenizer files in {folder}, got {reason}") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{argument}: expected a fast tokenizer, got {type(tokenizer).__name__}")
    if vocabulary is not None and len(tokenizer) > vocabulary:
        rule = f"a tokenizer of at most {vocabulary} tokens (the model's vocab_size)"
        raise ValueError(f"model: expected {rule}, got {len(tokenizer)}")
    return tokenizer


def _without_pooler(folder: Path) -> dict[str, bool]:
    """The pooler is not used here, and checkpoints of sentence encoders often lack it."""
    from transformers import MODEL_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    cls: Any = MODEL_MAPPING.get(type(config), None)
    option = "add_pooling_layer"
    return {option: False} if cls and option in inspect.signature(cls).parameters else {}


def text_length(asked: int | None, settings: SentenceSettings, tokenizer: Any, model: Any) -> int:
    """Tokens kept of each text: as asked, else the least that the model's files say."""
    most = int(model.config.max_position_embeddings)
    embeddings = getattr(model, "embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)
    if isinstance(padding, int) and hasattr(embeddings, "position_embeddings"):
        most -= padding + 1  # RoBERTa's table begins with rows that no text uses
    if asked is not None and asked > most:
        raise ValueError(f"max_length: expected at most {most} (this model's), got {asked}")
    special = int(tokenizer.num_special_tokens_to_add())
    if asked is not None and asked <= special:  # tokenizers do not cut at all then
        raise ValueError(
            f"max_length: expected at least {special + 1}, one more than the tokenizer's special "
            f"tokens, got {asked}"
        )
    return asked or min(settings.max_length or most, int(tokenizer.model_max_length), most)


def digest(folder: Path) -> str:
    """A short hash of every file that decides the numbers (about a second per GB of weights)."""
    hashed = hashlib.sha256()
    files = {*folder.glob("*.json"), *folder.glob("*/config.json"), *folder.glob("*.txt")}
    for path in sorted({*files, *folder.glob("*.safetensors")}):
        hashed.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    return hashed.hexdigest()[:16]
