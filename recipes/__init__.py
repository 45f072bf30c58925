"""Whole recipes, shipped with ppclc as package data."""
