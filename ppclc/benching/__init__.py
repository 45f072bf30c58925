"""How latency and memory are measured."""
