"""Optimizers, their state and schedules."""
