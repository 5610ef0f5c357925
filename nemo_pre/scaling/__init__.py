"""Scaling studies: a grid of runs that are simulated with the planner, submitted to Slurm, or read when finished.

A simulated figure is the planner's arithmetic with its stated efficiencies; every file that holds one says so.
"""
