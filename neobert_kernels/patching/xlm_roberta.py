"""XLM-RoBERTa: RoBERTa's classes under another name (BGE-M3, multilingual E5)."""

from neobert_kernels.patching import roberta

FAMILY = roberta.family("xlm_roberta", "XLMRoberta")
