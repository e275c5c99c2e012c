"""Losses that teach a student, one file per family: functions of tensors, without models or configuration."""
