"""Features of a frozen encoder for all images of a run's data: computing them, and refusing those of another run.

Their files, and reading them while training, are :mod:`nemo_pre.data.features`.
"""
