"""Dress rehearsals: a run's real training step at its true size, one rank at a time, on fake tensors.

Nothing is allocated or computed on the device; shapes, types, devices, schedules, messages and memory are the real
ones. ``rehearse`` is the verb, ``crew`` starts the ranks, ``rank`` is one of them, ``device`` is its GPU,
``rendezvous`` finds out whether the ranks' calls meet.
"""
