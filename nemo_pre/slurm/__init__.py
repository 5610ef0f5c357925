"""Runs as Slurm jobs: rendering and submitting them, and what keeps them alive. Imports nothing heavy."""
