"""What NeMo trains, asks for and registers: the Lightning module around a chunk, the data module, the connectors.

Everything here imports NeMo, which takes 10 to 30 s; what needs no NeMo is elsewhere.
"""
