"""How a job may end without the answer that it was to give."""

from tasks.contract.errors import SluiceError


class JobFailedError(SluiceError):
    """Every worker that ran this request died; it was given up, and is kept as a dead letter."""

    status = 500
    type = "server_error"
    code = "job_failed"
    # Otherwise OpenAI's SDK would have it end as many workers again, twice.
    should_retry = False


class AnswerTooLargeError(SluiceError):
    """The answer is too large; ask for fewer tokens, log probabilities or sequences."""

    status = 500
    type = "server_error"
    code = "answer_too_large"
    # It would be as large again.
    should_retry = False

    def __init__(self, most_bytes: int) -> None:
        super().__init__(
            f"The answer is larger than {most_bytes:,} bytes, the most that this server takes; ask "
            "for fewer tokens, log probabilities or sequences, or raise SLUICE_MAX_ANSWER_BYTES."
        )


class _LateError(SluiceError):
    """The job took longer than it may."""

    status = 504
    type = "timeout_error"
    # Whatever is too long once is so again.
    should_retry = False
    found = ""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"{self.found} within {limit_s:g} s; the job has ended.")


class FirstTokenTimeoutError(_LateError):
    """The engine made no token of the answer within the model's time limit."""

    code = "first_token_timeout"
    found = "The engine made no token of the answer"


class NextTokenTimeoutError(_LateError):
    """The engine made no further token within the model's time limit."""

    code = "next_token_timeout"
    found = "The engine made no further token of the answer"


class JobTimeoutError(_LateError):
    """The job did not end within its time limit, or the model's."""

    code = "job_timeout"
    found = "The job did not end"


class JobExpiredError(SluiceError):
    """The job did not start before its deadline."""

    status = 504
    type = "timeout_error"
    code = "job_expired"
    should_retry = False


class JobLostError(SluiceError):
    """The queue has lost this request; send it again."""

    status = 503
    type = "overloaded_error"
    code = "job_lost"
    retry_after_s = 1.0


class StreamBrokenError(SluiceError):
    """The worker died in the middle of this answer, which cannot be continued; send it again."""

    status = 502
    type = "server_error"
    code = "stream_broken"


class JobCancelledError(SluiceError):
    """The job was cancelled."""

    status = 409
    type = "conflict_error"
    code = "job_cancelled"
    should_retry = False
