"""Model FLOP utilisation: the arithmetic that training needs over what the GPUs could do.

Multiplications and additions of a forward count once, of its backward twice. What a run does on
top, such as recomputing activations, is not counted: it makes the share smaller.
"""

import re

import torch

from neobert.config import NeoBERTConfig

# Dense bfloat16 with float32 sums, FLOP/s, from NVIDIA's data sheets: the first name that occurs.
PEAKS: tuple[tuple[str, float], ...] = (
    (r"B200", 2250e12),
    (r"GH200|H200", 989e12),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100", 989e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"L4", 121e12),
    (r"A10", 125e12),
    (r"RTX 4090", 165e12),
)
# Parts of names of slower devices that share a name with one above.
OTHERS = r"\b(MIG|Laptop|Mobile|Max-Q)\b"


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
    return next((rate for words, rate in PEAKS if re.search(rf"\b({words})\b", name)), None)


def utilisation(
    flops_per_token: float, tokens_per_s: float, peak: float | None, devices: int = 1
) -> float | None:
    """Share of the peak of all devices; None without one."""
    return None if peak is None else flops_per_token * tokens_per_s / (peak * devices)
