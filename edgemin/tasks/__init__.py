"""Kinds of task: one file per kind, and the table that finds them by name."""
