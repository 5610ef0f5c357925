"""A vision tower taught offline, of composed scenes: what each patch shows, and where that begins and ends.

:mod:`.labels` says what is to be learned of a patch, :mod:`.scenes` reads prepared scenes, :mod:`.teacher` teaches a
tower and measures it, :mod:`.teach` is the command, and writes what a run names as ``vision_from``.
"""
