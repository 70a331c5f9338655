"""Model FLOP utilisation: the arithmetic that training needs over what the GPUs could do.

Multiplications and additions of a forward count once, of its backward twice. What a run does on
top, such as recomputing activations, is not counted: it makes the share smaller.
"""

import re

import torch

from neobert.config import NeoBERTConfig
from neobert.floors.gpus import GPUS

# What a driver calls the GPUs of `neobert.floors.gpus`; slower cards share a part of their names.
NAMES = {
    r"B200": "b200",
    r"GH200|H200": "h200",
    r"H100": "h100",
    r"A100": "a100",
    r"L4": "l4",
    r"RTX 4090": "rtx-4090",
}
OTHERS = r"\b(PCIe|NVL|MIG|Laptop|Mobile|Max-Q)\b"


def model_flops_per_token(
    config: NeoBERTConfig,
    context: float,
    *,
    labelled: float = 0.2,
    last_layer_at_labels: bool = True,
) -> float:
    """FLOP of one real token in a training step: forward and backward.

    Args:
        config: Shape of the model.
        context: Mean over tokens of their document's length: sum(length**2) / sum(length).
        labelled: Share of tokens with a label, which alone reach the decoder.
        last_layer_at_labels: The last block behind its attention is also computed at these alone.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    everywhere = 3 * width * width  # q, k, v
    behind = width * width + 3 * width * config.feed_forward_size  # output, w12, w3
    attention = 2 * width * context  # scores, and their product with the values
    products = layers * (everywhere + attention + behind) + labelled * width * config.vocab_size
    if last_layer_at_labels and layers:
        products -= (1 - labelled) * behind
    return 3 * 2 * products


def peak_flops(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """FLOP/s of a device, at most; None where that is not known.

    Args:
        device: A device of this machine.
        dtype: What matrices are multiplied in; known for the 16-bit types.
    """
    device = torch.device(device)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """`peak_flops` of a GPU by the name that its driver gives."""
    if re.search(OTHERS, name):
        return None
    found = (key for words, key in NAMES.items() if re.search(rf"\b({words})\b", name))
    return next((GPUS[key].matrix_flop_per_s for key in found), None)


def utilisation(
    flops_per_token: float, tokens_per_s: float, peak: float | None, devices: int = 1
) -> float | None:
    """Share of the peak of all devices; None without one."""
    return None if peak is None else flops_per_token * tokens_per_s / (peak * devices)
