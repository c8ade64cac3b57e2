"""The demonstration: the same data and steps for one LoRA, a LoRA a task and a routed mixture, then merges."""

from moadapt.demo.settings import DemoSettings

__all__ = ["DemoSettings"]
