"""What the ``compressm`` command runs: data, models, presets, training, comparison, reports."""
