class lmms:
    def __init__(self):
        self.task_dict = {}

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size
