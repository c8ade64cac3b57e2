"""PEFT folders out."""
