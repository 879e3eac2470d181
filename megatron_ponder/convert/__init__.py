"""Between our weights and Hugging Face's."""
