"""What an export wrote: its receipt, where it leaves eager, and how it stands in for a model."""
