"""NeMo's NeVA, subclassed: it lays sequences out once for every stage and exposes what losses need.

Importing this package imports NeMo (10 to 30 s); :mod:`nemo_pre.cli` and the configuration never do.
"""
