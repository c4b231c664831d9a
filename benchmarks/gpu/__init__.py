"""The parts of a session on a GPU: see gpu_session.py beside this folder.  They need torch, triton, numpy and pytest alone."""
