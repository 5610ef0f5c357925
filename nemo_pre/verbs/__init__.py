"""Verbs of ``nemo-pre`` that check a run before they ask a room that the checks themselves ask."""
