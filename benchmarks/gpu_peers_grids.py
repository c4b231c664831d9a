"""How the programs of our kernels, of mamba_ssm's and of flash-linear-attention's divide the work of a head among them."""

from __future__ import annotations

import math

HEADS, CHUNK = 24, 256  # heads of a group of Mamba-2's scan, steps of mamba_ssm's chunks
# Steps of a program, or of a turn of its loop over steps: a tile, or a number.  Then, as size/tile, how many programs a head
# needs for these steps; a turn of a loop over heads counts as one.
DIVIDED = {
    "ssd_states": ("T", "P/BP", "N/BN"), "ssd_outputs": ("T",), "ssd_values": ("T",), "ssd_keys": ("T", "N/BN"),
    "delta_products": ("T",), "delta_inverse": ("T",), "delta_states": ("T", "V/BP"), "delta_outputs": ("T",),
    "delta_reverse": ("T", "V/BP"), "delta_pairs": ("T",), "delta_keys": ("T", "K/BN"),
    "chunk_state_fwd": ("K", "P/M", "N/N"), "chunk_state_bwd_db": ("M", "N/N"),
    "state_passing_fwd": (CHUNK, "state/BLOCK_SIZE"),
    "bmm_chunk_fwd": ("M", "L/N"), "bmm_chunk_bwd": ("M", "N/N"), "chunk_scan_fwd": ("M", "P/N"),
    "chunk_scan_bwd_dstates": ("K", "P/M", "N/N"), "chunk_scan_bwd_dc": ("M", "N/N"), "chunk_scan_bwd_dcb": ("M", "L/N"),
    "chunk_scan_bwd_ddAcs_stable": ("M",), "chunk_scan_chunk_state_bwd_dx": ("M", "P/N"),
    "chunk_gated_delta_rule_fwd_kkt_solve": ("BT",), "recompute_w_u_fwd": ("BT",), "prepare_wy_repr_bwd": ("BT",),
    "chunk_gated_delta_rule_fwd_h_blockdim64": ("BT", "V/BV"), "chunk_gated_delta_rule_bwd_dhu_blockdim64": ("BT", "V/BV"),
    "chunk_fwd_o": ("BT", "V/BV"), "chunk_bwd_dv_local": ("BT",), "chunk_bwd_dqkwg": ("BT", "K/BK"),
    "chunk_fwd_h": ("BT", "K/BK", "V/BV"), "chunk_bwd_dh": ("BT", "K/BK", "V/BV"), "chunk_bwd_dv": ("BT", "V/BV"),
}  # fmt: skip
OF_A_GROUP = ("bmm_chunk_fwd", "bmm_chunk_bwd")  # programs that all heads of a group share


def divided(name: str, tiles: dict[str, int], states: int, width: int) -> tuple[int, float]:
    """(steps, programs of a head for them) of a kernel, for heads of ``width`` channels."""
    sizes = {"N": states, "K": states, "P": width, "V": width, "L": CHUNK, "state": width * states}
    steps, *axes = DIVIDED[name]
    programs = math.prod(-(-sizes[size] // tiles[tile]) for size, tile in (axis.split("/") for axis in axes))
    return tiles.get(steps, steps), programs / HEADS if name in OF_A_GROUP else programs
