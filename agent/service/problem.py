"""What is told to a client when something is wrong, in the shape of OpenAI's errors."""

from __future__ import annotations

from fastapi import Response
from fastapi.responses import JSONResponse


class Problem(Exception):
    """What is told to the client, in the shape of OpenAI's errors."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.kind, self.after_s = status, kind, after_s

    def response(self) -> Response:
        """As HTTP."""
        error = {"message": str(self), "type": self.kind, "param": None, "code": None}
        headers = {"Retry-After": str(int(self.after_s + 0.999))} if self.after_s else None
        return JSONResponse({"error": error}, self.status, headers)
