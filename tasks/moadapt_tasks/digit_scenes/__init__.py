"""Digit scenes: the embedded data set and its small base."""
