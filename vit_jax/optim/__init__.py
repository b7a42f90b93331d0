"""Losses, optimizers, schedules, and the plan of a run."""
