"""The speed report of result files: what their figures say, in words and pictures, and what changed between two of them."""
