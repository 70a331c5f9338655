"""The paper's pre-training: recipe, tokenised store, masked batches (docs/pretraining.md)."""
