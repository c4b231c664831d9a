"""Thin hooks for training frameworks; import the one you use, such as ``compressm.integrations.lightning``."""

from compressm.integrations.resizing import resize_on_load, resize_to

__all__ = ["resize_on_load", "resize_to"]
