"""Loading checks: a checkpoint without the whole model is an error that names the tensor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel


@contextmanager
def readable(source: Any) -> Iterator[None]:
    """Turn a damaged or truncated safetensors file of ``source`` into an OSError that names it."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{source}: expected a complete safetensors file, got {error}") from error


def check_loaded(
    model: PreTrainedModel, info: dict[str, Any], source: Any, *, any_shape: bool = False
) -> None:
    """Raise for the first tensor that loading left without the checkpoint's values.

    A head of which the checkpoint has nothing is new and keeps its initial values: that is how
    fine-tuning starts. A head of which it has a part is damaged.

    Args:
        model: The model just loaded.
        info: ``missing_keys`` and ``mismatched_keys`` as `from_pretrained` reports them.
        source: Where the checkpoint came from, for the message.
        any_shape: Accept tensors of another shape, which were initialized anew.

    Raises:
        ValueError: A tensor is missing or misshapen.
    """
    missing, misshapen = set(info["missing_keys"]), set(info["mismatched_keys"])
    backbone = "" if model.base_model is model else f"{model.base_model_prefix}."
    head = {name for name in model.state_dict() if not name.startswith(backbone)}
    if head <= missing:
        missing -= head
    checkpoint = f"checkpoint {source}"
    if misshapen and not any_shape:
        name, found, expected = min(misshapen)
        raise ValueError(
            f"{checkpoint}: expected {name} of shape {tuple(expected)}, got {tuple(found)}"
            f"{_others(misshapen)}"
        )
    if missing:
        raise ValueError(f"{checkpoint}: expected {min(missing)}, got none{_others(missing)}")


def _others(names: set[Any]) -> str:
    return f" (and {len(names) - 1} more such tensors)" if len(names) > 1 else ""
