"""What users run today, a file for each: run beside us on the same inputs, in the same process and the same rounds."""

from __future__ import annotations

from peers import torch_forms
from peers.base import Peer

PEERS: list[Peer] = [*torch_forms.PEERS]
