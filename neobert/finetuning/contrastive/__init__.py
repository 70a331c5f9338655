"""Contrastive fine-tuning on sentence-transformers' trainer: our loss, the paper's recipe."""
