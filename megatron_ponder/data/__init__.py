"""From text to batches: readers, tokenizers, preprocessing, datasets, loader."""
