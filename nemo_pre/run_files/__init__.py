"""What a run leaves on disk, read and written here and nowhere else."""
