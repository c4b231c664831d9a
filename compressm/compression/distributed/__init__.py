"""Training on several processes with torch.distributed: DistributedDataParallel and FSDP2 (``fully_shard``).

The ranks of all layers are decided once.  Every process measures its own calibration batches; the measurements are added up
over the process group; every process then computes the same plan, takes the numbers of rank 0 where machines may round
differently (ranks, spectra, new parameters, optimizer state, averages), and compares hashes with the others: of the
parameters before, of the plan, and of what came out.  A difference or a failure anywhere raises everywhere, and nothing has
changed.

DistributedDataParallel cannot follow a change of its parameters: after every :meth:`Compressor.step` say

    model = compressor.rewrap()

which returns the same wrapper if nothing was reduced, and else a new one with the same options; the old one raises when it is
called.  A model under ``fully_shard`` is reduced in place, one layer gathered at a time, and needs nothing.
"""
