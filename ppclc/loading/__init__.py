"""From a path or a hub to configurations and tensors."""
