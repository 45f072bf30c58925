"""Gradient steps: the loop, what each edit learns, and edits that learn beside each other."""
