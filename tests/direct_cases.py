"""Small frozen models on few tokens, for the files that test them."""

import pytest
import torch
from encoders import ENCODERS, VOCABULARY, padded, randomized

from neobert_kernels import _runtime

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.bfloat16, *((torch.float16,) if CUDA else ()))
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}  # of float32 values up to about 10, through three layers
runs_kernel = pytest.mark.skipif(
    not CUDA and not _runtime.INTERPRET, reason="no kernel runs on the CPU"
)
# RoBERTa's layers are BERT's.
every_family = pytest.mark.parametrize(
    "family", [name for name in ENCODERS if CUDA or "roberta" not in name]
)
# NeoBERT adds before its norms and BERT behind them: in the interpreter these stand for all.
both_orders = pytest.mark.parametrize("family", ["neobert", "bert"])


def encoder(family="neobert", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = ENCODERS[family].base(**{"num_hidden_layers": 2} | changes)
    return randomized(model).to(DEVICE, dtype).eval()


def packed(*lengths):
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (1, sum(lengths)), generator=generator)
    inputs = {"input_ids": ids, "cu_seq_lens_q": bounds}
    return {k: v.to(DEVICE) for k, v in inputs.items()} | {"max_length_q": max(lengths)}


@torch.no_grad()
def states(model, **inputs):
    return model(**inputs).last_hidden_state


def real_states(model, family):
    torch.manual_seed(1)
    ids, mask = (x.to(DEVICE) for x in padded(family))
    return states(model, input_ids=ids, attention_mask=mask)[mask == 1]
