"""Text at the edges: tokenizer, sampling, generation, and texts from files."""
