"""One module per model family, found by its name: facts about its stock Hugging Face class."""
