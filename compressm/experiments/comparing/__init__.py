"""What ``compressm compare`` runs: every method with several seeds, its learning rate tuned apart, and the statistics."""

from compressm.experiments.comparing.command import PAGE_FILE, RESULT_FILE, run, tables
from compressm.experiments.comparing.design import plan

__all__ = ["PAGE_FILE", "RESULT_FILE", "plan", "run", "tables"]
