"""Studies: many runs that together answer a question, as one command that can be killed and started again.

:mod:`.arms` says what is compared, :mod:`.runs` trains and diagnoses, :mod:`.summary` puts the numbers with intervals
into one file, :mod:`.figures` and :mod:`.page` show it.
"""
