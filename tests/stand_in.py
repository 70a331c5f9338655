"""In place of a CUDA graph, where there is no GPU."""


class StandIn:
    """Repeats the function on the recorded tensors, into the recorded results."""

    recorded = 0

    def __init__(self, function, pool):
        type(self).recorded += 1
        self.function, self.outputs = function, function()

    def replay(self):
        for own, new in zip(self.outputs, self.function(), strict=True):
            if own is not None:
                own.copy_(new)
