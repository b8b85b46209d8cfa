"""Losses: pure functions of features."""
