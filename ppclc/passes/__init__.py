"""Passes: plain functions from frozen records to one record. They share through modules, not through one another."""
