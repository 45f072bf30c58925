"""Devices and processes: ranks, locks, stops, the state of a GPU."""
