"""Seeing visual degradation: what becomes of the visual tokens on their way through the language model.

Measures (:mod:`.moments`, :mod:`.patches`, :mod:`.probe`) are sums over tokens or images: memory does not grow with
the images, and the sums of several ranks merge. Two sources give them the same tokens: a Hugging Face directory
(:mod:`.huggingface`) and a checkpoint in any tensor and pipeline layout (:mod:`.megatron`).
"""
