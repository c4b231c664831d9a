"""The Compressor and ``compress``: a plan carried out, in mid-training or after it."""
