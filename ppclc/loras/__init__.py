"""A teacher's LoRA for its student."""
