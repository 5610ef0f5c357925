"""The first quarter of an hour on a GPU: steps in the order of what matters, none of which can take down another.

``benchmarks/gpu/first_contact.sh`` starts it. ``contact.py`` has the table of the steps, ``harness.py`` runs each as a
process of its own under a limit, ``record.py`` is what a step says, ``summary.py`` what is read afterwards.
"""
