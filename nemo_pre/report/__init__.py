"""What finished runs say: several in comparison (``compare``), one as an HTML page (``page``)."""
