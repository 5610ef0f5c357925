"""What lies in a checkpoint's ``weights`` directory, read without running code out of it, and checked against its
checksums before anything is loaded."""
