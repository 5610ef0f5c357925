"""Starting and stopping processes: ranks, their environment, what a job is told."""
