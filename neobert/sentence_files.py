"""What a sentence-transformers folder says about pooling, normalization, length and prompts.

A folder without ``modules.json`` is a plain encoder: mean pooling, no normalization, which is also
what sentence-transformers makes of it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POOLINGS = ("mean", "cls")


@dataclass(frozen=True)
class SentenceSettings:
    """How token vectors become one vector, and how much text goes in.

    Attributes:
        pooling: "mean" or "cls" (the first token).
        normalize: Scale every embedding to length 1.
        max_length: Tokens kept of a text; None leaves it to tokenizer and model.
        prompt: Put before every text.
    """

    pooling: str = "mean"
    normalize: bool = False
    max_length: int | None = None
    prompt: str = ""


def read_settings(folder: Path) -> SentenceSettings:
    """Read a model folder's sentence-transformers files.

    Raises:
        ValueError: A file is broken, or asks for a module or pooling that is not supported.
    """
    if not (folder / "modules.json").is_file():
        return SentenceSettings()
    pooling, normalize, length = "mean", False, None
    for module in _read(folder / "modules.json", list):
        kind, path = str(module.get("type", "")).rpartition(".")[2], folder / module.get("path", "")
        if kind == "Transformer":
            length = _max_length(path)
        elif kind == "Pooling":
            pooling = _pooling(path / "config.json")
        elif kind == "Normalize":
            normalize = True
        else:
            raise ValueError(
                f"modules.json: expected Transformer, Pooling and Normalize, got {kind or module}"
            )
    return SentenceSettings(pooling, normalize, length, _prompt(folder))


def _read(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name}: expected a readable JSON file, got {error}") from None
    if not isinstance(value, kind):
        raise ValueError(
            f"{path.name}: expected a JSON {kind.__name__}, got {type(value).__name__}"
        )
    return value


def _max_length(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    return _read(path, dict).get("max_seq_length") if path.is_file() else None


def _pooling(path: Path) -> str:
    """The one pooling mode of either file format: a name, or a flag per mode."""
    config = _read(path, dict)
    modes = config.get("pooling_mode")
    if modes is None:
        names = {"cls_token": "cls", "mean_tokens": "mean"}
        flags = [k.removeprefix("pooling_mode_") for k, on in config.items() if on is True]
        modes = [names.get(name, name) for name in flags if name != "include_prompt"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"{path.name}: expected pooling {' or '.join(POOLINGS)}, got {modes}")
    return str(modes[0])


def _prompt(folder: Path) -> str:
    path = folder / "config_sentence_transformers.json"
    config = _read(path, dict) if path.is_file() else {}
    name = config.get("default_prompt_name")
    return str((config.get("prompts") or {}).get(name, "")) if name else ""
