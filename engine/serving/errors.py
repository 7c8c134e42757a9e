"""How a request to a serving engine ends without images, beside the errors of :meth:`stepfusion.Engine.sample`."""


class Overloaded(RuntimeError):
    """The queue is full. ``retry_after`` estimates the seconds until there is room for this request."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(TimeoutError):
    """The request was not done by its deadline, or could not have been."""


class EngineClosed(RuntimeError):
    """The engine takes no requests: it was closed, or never started."""


class EngineDead(RuntimeError):
    """The engine stopped working; the message and ``__cause__`` say why. Every request it has or gets ends so."""
