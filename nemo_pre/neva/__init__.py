"""NeVA on Megatron-Core: it lays sequences out once for every stage and exposes what losses need.

Importing this package imports Megatron-Core and no NeMo; :mod:`nemo_pre.nemo` has what NeMo trains of it.
"""
